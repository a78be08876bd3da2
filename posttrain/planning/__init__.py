"""Parameters and memory of a model on paper: from its config alone, no weights.

sizes.py counts parameters (it builds the model on the meta device); the rest is arithmetic without torch.
"""
