"""Reward plug-ins: how one is found, what fields of a row it needs, and with which arguments it is called.

lookup.py         finds the function that a config names, and checks it without importing it
source.py         reads a module's source without running it
imports.py        tells which packages a module imports that are not installed
interpreter.py    another Python interpreter, in which a plug-in runs with packages of its own
target.py         imports the function and binds its arguments
requirements.py   tells which fields of a row a reward needs, and which source files it consists of
"""
