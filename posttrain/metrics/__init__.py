"""Figures about replies and runs, and where they go.

correctness.py               the rule that says whether a reply is right
pass_at_k.py intervals.py    pass@k; 95% intervals of shares and means
trackers.py tail.py          sends metrics.jsonl to TensorBoard, trackio or wandb; follows the file
faults.py                    the words for events that tell of a fault
"""
