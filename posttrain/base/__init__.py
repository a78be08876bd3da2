"""The stage `base`: it trains the tiny model of a bundled pipeline from random weights, and writes its datasets.

config.py stage.py        the keys, and the stage
tasks.py families/ problem.py   the puzzles: five families with five levels each, and their records
sets.py corpus.py         the datasets of the later stages; the text that the model is trained on
tokenizer.py model.py     one token for each word of the puzzles; a Llama 4 of under a million parameters
train.py rank.py muon.py  starts the training processes; what each of them does; their optimizer
checkpoint.py             the file from which a training that was cut goes on
courses.py tools/         what a model can be trained for; the puzzles of the pipeline `tools`
cache.py                  base models that were trained earlier with the same input
"""
