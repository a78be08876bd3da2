"""The puzzles of the pipeline `tools`: three families that need a tool or several turns, and two that need neither.

arithmetic.py store.py guessing.py   a calculator, values in a store, and a number to guess; each with its schemas
turns.py                             the turns of their solutions
puzzles.py                           the table of all families, and how often the base model does the right thing
tokenizer.py text.py                 one token for each word of them; the text that the base model is trained on

The base model knows how to call a tool, but mostly answers from its head, stops after one look-up, or counts where it
could halve. Reinforcement learning can find out what pays. The worlds are in `posttrain/environments/`.
"""
