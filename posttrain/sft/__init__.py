"""The stage `sft`, supervised fine-tuning. What it shares with DPO is in `posttrain/tune/`.

config.py stage.py      the keys, and the stage
examples.py packing.py  rows become token ids and masks; conversations are packed into rows of one length
isolation.py            checks that the model keeps packed conversations apart
trainer.py              TRL's trainer on a DeepSpeed engine
"""
