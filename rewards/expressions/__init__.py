"""Reads a mathematical answer to its end, or not at all, and compares two of them exactly.

    text ─► notation.py ─► answers.py ─► formula.py (tokens.py) ─► compare.py (numbers.py, regions.py, units.py)
            one spelling   lists, sets,  one formula as a tree     values at sample points, in exact
            of each sign   relations     (tree.py)                 or long arithmetic

A text with a part that no rule reads is `Unreadable`: its readable beginning never counts. Limits, integrals and
derivatives are not computed; such an answer equals only the same text. Everything is bounded: the size of a number, of
a sum, of a text, and the depth of brackets.
"""
