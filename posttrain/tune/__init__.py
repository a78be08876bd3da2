"""What the two stages that train with TRL share: a run on ranks, its steps, checkpoints, adapters, drift and routers.

    run.py         the ranks of one stage: load the model, train it, measure it, export it
    loop.py        TRL's trainer inside them: metrics and progress out, the last checkpoint in
    steps.py       what makes an optimizer step the same however its rows are dealt out
    engine.py      the DeepSpeed engine under TRL's trainer, and its checkpoints
    checkpoints.py which checkpoints belong to a training, and when one is complete
    settings.py    the arguments of TRL
    adapters.py drift.py routers.py

A stage, `sft` or `dpo`, adds only how rows become examples, and its loss.
"""
