"""The stage `eval`: pass rates of a policy on problems that it was never trained on.

config.py stage.py   the keys, and the stage
heldout.py           checks that no held-out problem is also in a training set
replies.py           has the policy sample replies, and gathers their scores by prompt
results.py           computes the rates and their intervals
"""
