"""Sampling rollouts: engines that serve the policy, with new weights while they work.

config.py     the keys that say what is sampled, and on which engines
requests.py   what an engine is asked for one prompt
workers.py    the rollout workers: fed and emptied in batches, updated in flight, replaced when lost
weights.py    how the trainer's weights reach the engines
"""
