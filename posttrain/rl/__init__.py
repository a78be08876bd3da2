"""Asynchronous online RL.

    records.py                 drawn prompts, groups and scored groups
    loss_config.py             the loss and its constants, as keys of the config
    advantages.py losses.py    the two tables that a new rule is added to
    objective.py               what a step minimises: a loss, divided once, an entropy bonus, a reference term
    rollouts/                  sampling rollouts from engines
    grading/                   rewards, advantages
    prompts/                   which prompts, how hard
    training/                  optimizer steps
    history/                   ledger, archive, resume, replay
    config.py                  all keys of an RL stage: the sections of the rooms, and the keys of the loop
    loop/                      the controller that joins them
    inputs.py                  what the stage reads before anything starts
    stage.py                   the stage from start to end

Rooms import only from those above them in this list; so a room cannot take `RlConfig`, only its own section.
"""
