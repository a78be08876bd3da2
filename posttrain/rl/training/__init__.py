"""From scored groups to an optimizer step.

config.py      the keys that say how the policy is trained
client.py      the trainer as the rest of RL calls it, over its ranks
protocol.py    what a trainer does, as types
samples.py     groups as training samples, and samples as tensors
policy.py      the policy as a function from tensors to log-probabilities
trainer.py     the ranks that step
reference.py   the frozen reference policy, in a process of its own
evidence.py    what is kept of an update that was not finite
"""
