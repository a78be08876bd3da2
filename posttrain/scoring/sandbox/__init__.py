"""Runs untrusted programs without network, host files or unlimited resources.

run.py      start a program, limit it, read what it printed
inside.py   the first program in the sandbox: it isolates itself, then becomes the program to run
"""
