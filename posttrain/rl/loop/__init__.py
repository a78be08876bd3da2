"""What happens next: the controller's loops, and what they keep count of.

controller.py   the loops: dispatch, score, train, publish weights
group_book.py   where every group stands, and the one place in which a group changes its state
checkpoints.py  when a checkpoint is due, how it is written, and the commit that makes it count
staleness.py    the queue between sampling and training, which keeps the bound on staleness
side.py         probes and evaluations that are sampled beside the training
evaluation.py   what an evaluation beside the training asks, and what it writes
tally.py        the metrics of a step
parity.py       before the first step: do engine and trainer agree on log-probabilities?
garbage.py      how often Python's cyclic garbage collector runs in the controller
"""
