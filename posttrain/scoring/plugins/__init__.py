"""A reward plug-in: where it is, what it needs, what it is called with.

lookup.py         a name in a config -> the function, checked without importing it
source.py         a module's source, read without running it
target.py         the function itself, with its arguments bound
requirements.py   the fields of a row that a reward needs, and the files it consists of
"""
