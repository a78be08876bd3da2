"""The stage `dpo`, direct preference optimization. What it shares with SFT is in `posttrain/tune/`.

config.py stage.py   the keys, and the stage
mine.py              makes preference pairs of the rollouts that an RL stage recorded
examples.py          pairs become token ids
losses.py            the losses of a pair
trainer.py           TRL's trainer with these token ids and losses
"""
