"""Measures of replies and runs, and the trackers that metrics are sent to.

correctness.py               the rule that says whether a reply is right
pass_at_k.py intervals.py    pass@k; 95% intervals of shares and means
trackers.py tail.py          sends metrics.jsonl to TensorBoard, trackio or wandb; follows the file
paired.py                    compares two policies on the same rows
unscored.py                  counts replies without a score, and reports them
faults.py                    the words for events about faults and recoveries
"""
