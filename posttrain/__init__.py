"""posttrain: the post-training recipe behind Llama 4, from a judge-made filter to light DPO."""

__version__ = "0.1.0"
