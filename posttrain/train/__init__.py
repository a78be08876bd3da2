"""Log-probabilities of tokens from hidden states (logprobs.py) and figures on routers (routers.py), for any trainer."""
