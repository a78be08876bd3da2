"""Sampling rollouts: what RL asks of the workers of `sampling/workers.py`, which serve the policy.

config.py     the keys that say what is sampled, and on which engines
requests.py   what an engine is asked for one prompt
weights.py    how the trainer's weights reach the engines
"""
