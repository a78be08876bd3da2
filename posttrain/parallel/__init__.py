"""Training over several processes: Ray actors as ranks, a DeepSpeed engine in each, whole tensors in and out."""
