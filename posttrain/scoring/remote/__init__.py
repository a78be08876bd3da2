"""The reward pool as a Ray actor.

client.py   what a stage uses: it scores, and replaces an actor that is lost
life.py     starts one actor, watches it with a heartbeat, and ends it
actor.py    the actor, which holds the pool
messages.py the messages between stage and actor
"""
