"""The controller of a run: its loops, and the records that the loops keep.

controller.py   the loops: dispatch, score, train, publish weights
group_book.py   the state of every group, and the only place in which it changes
checkpoints.py  when a checkpoint is due, how it is written and committed
staleness.py    the queue between sampling and training, which bounds staleness and forms batches
side.py         probes and evaluations that are sampled beside the training
evaluation.py   the prompts and the accuracies of an evaluation beside the training
tally.py        the metrics of a step
parity.py       the check before the first step that engines and trainer agree on log-probabilities
"""
