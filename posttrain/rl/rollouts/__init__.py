"""Sampling rollouts: the part of RL that uses the workers of `sampling/workers.py`, which serve the policy.

config.py     the keys that say what is sampled, and on which engines
requests.py   the request for the replies to one prompt
weights.py    the update of all engines with the trainer's new weights
"""
