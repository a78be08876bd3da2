"""Puzzles about pictures: five families about drawn pictures, and two of text alone.

drawing.py                           pictures of a grid of cells: colours, bars and digits
counting.py cells.py bars.py digits.py differing.py    count, find, compare, read, and which of several pictures differs
puzzles.py                           the table of all families, and how often the base model does the right thing
tokenizer.py text.py                 one token for each word of them; the text that the base model is trained on
model.py                             a multimodal Llama 4 of a million parameters, and its processor

As in the puzzles of text, work pays: a reply that says what it sees, and then answers, is right more often than one
that answers at a glance, but the base model mostly answers at a glance.
"""
