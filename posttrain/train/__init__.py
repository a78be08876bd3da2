"""Shared by all trainers of a policy: log-probabilities from hidden states (logprobs.py), figures on routers."""
