"""What every trainer of a policy shares: log-probabilities straight from hidden states, and figures on routers."""
