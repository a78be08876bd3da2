"""Computes the parameters and the training memory of a model from its config alone, without weights.

config.py        the keys: the shape of a model, and how it is trained
sizes.py         counts parameters, on the model built on torch's meta device
memory.py        bytes of weights, gradients and optimizer on one rank
activations.py   bytes of activations and of the KV cache
layouts.py       the memory of a layout, and which layouts fit
text.py          a plan as text and as JSON

Except sizes.py, all of it is arithmetic without torch.
"""
