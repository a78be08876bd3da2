"""Runs untrusted programs without network, host files or unlimited resources.

run.py      start a program, limit it, read what it printed
kept.py     a sandbox for many programs, one after the other, which share their files
inside.py   the first program in the sandbox: it isolates itself, then becomes the program to run
keeper.py   that program in a sandbox that is kept
"""
