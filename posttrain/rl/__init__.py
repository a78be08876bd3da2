"""Asynchronous online RL.

    config.py loss_config.py   the stage's section of the YAML
    records.py                 drawn prompts, groups and scored groups
    advantages.py losses.py    the two tables that a new rule is added to
    rollouts/                  sampling rollouts from engines
    grading/                   rewards, advantages
    prompts/                   which prompts, how hard
    training/                  optimizer steps
    history/                   ledger, archive, resume, replay
    loop/                      the controller that joins them
    stage.py                   the stage from start to end

Rooms import only from those above them in this list.
"""
