"""The code that the two stages which train with TRL, `sft` and `dpo`, share.

    run.py         the ranks of one stage: load the model, train it, measure it, export it
    home.py        the folder of the stage, as ranks reach it from any host
    loop.py        TRL's trainer in a rank: reports metrics and progress, starts from the last checkpoint
    steps.py       makes an optimizer step independent of how its rows are divided among forwards and ranks
    engine.py      the DeepSpeed engine under TRL's trainer, and its checkpoints
    checkpoints.py which checkpoints belong to a training, and when one is complete
    settings.py    the arguments of TRL's trainers
    examples.py    a tokenized conversation, as the stage's process hands it to the ranks
    adapters.py drift.py routers.py

A stage adds only its loss and the way in which its rows become examples.
"""
