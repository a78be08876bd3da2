"""Serves a finished model by vLLM's own server, to try it by hand or from other programs.

models.py    the model folder that a path means: its own, or the last model of a run
server.py    the server as a process that ends with this one
process.py   the program of that process
chat.py      a conversation in the terminal

Left out: recording what is said, which is the business of episodes (episodes/agents/).
"""
