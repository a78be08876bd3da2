"""The `posttrain` command.

main.py                   every command, each a thin layer over the package
check.py hints.py         which schema a file is checked with; the key that a mistaken option means
runs.py display.py rl_panel.py outcome.py   runs: the plan before, the live table, the figures of RL, the result
data.py prune.py          `posttrain data`: look at a dataset, convert it, leave out rows
doctor.py doctor_checks.py doctor_probes.py   `posttrain doctor`: what works on this machine
audit.py replay.py        `posttrain ledger audit` and `posttrain rl --replay`
"""
