"""Reads mathematical answers, each to its end or not at all, and compares them exactly.

    text ─► notation.py ─► answers.py ─► formula.py ─────────────► compare.py (numbers.py, regions.py, units.py)
            one spelling   lists, sets,  one formula as a tree     values at sample points, in exact
            of each sign   relations     (operands.py, tokens.py,  or long arithmetic
                                         tree.py)

A text is `Unreadable` if no rule reads some part of it; a readable beginning never counts. Limits, integrals and
derivatives are not computed; such an answer equals only the same text. The sizes of numbers, sums and texts and the
depth of brackets are bounded, so that no answer can take long.
"""
