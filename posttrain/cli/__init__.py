"""The `posttrain` command.

main.py                   joins the commands; turns an exception into a message and an exit code
stages.py                 `posttrain run`, and one command for each kind of stage
info.py                   commands that start no stage: validate, plan, schema, doctor, report, compare, ledger
forecast.py               `plan --cluster`
check.py hints.py         the schema that a file is checked with; the key that a mistaken option means
runs.py display.py rl_panel.py outcome.py   runs: the plan before, the live table, the figures of RL, the result
data.py prune.py          `posttrain data`: look at a dataset, convert it, remove rows
rewards.py                `posttrain rewards`: list, try, audit and begin a reward
compare.py                `posttrain compare`: two evaluations side by side
doctor.py doctor_checks.py doctor_probes.py   `posttrain doctor`: what works on this machine
audit.py replay.py        `posttrain ledger audit` and `posttrain rl --replay`
"""
