"""The pool as a Ray actor.

messages.py what goes between the two, as bytes
actor.py    the actor: scorings are submitted and collected in batches
life.py     one actor from start to end, watched
client.py   what a stage uses: an actor that is lost is replaced
"""
