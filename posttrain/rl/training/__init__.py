"""From scored groups to an optimizer step.

config.py      the keys that say how the policy is trained
client.py      the interface through which the rest of RL calls the trainer's ranks
protocol.py    the methods of a trainer, as types
samples.py     make training samples of groups
batches.py     which samples share a forward, and its tensors
policy.py      the policy as a function from tensors to log-probabilities
adapters.py    adapters (LoRA) in the policy
forward.py     a micro-batch's share of the loss
publishing.py  each rank writes its part of the weights for the engines
trainer.py     the optimizer step, in each rank
away.py        the trainer and the reference on another host than the home host
reference.py frozen_policy.py    the frozen reference policy, and what runs in its process
evidence.py    keep the batch of an update that was not finite
"""
