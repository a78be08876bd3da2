"""The controller of a run: its loops, and the records that the loops keep.

controller.py   joins all parts, and runs the loops in one TaskGroup
parts.py        the actors and stores that it is given
dispatch.py scoring.py steps.py   the loops: admit groups, score them, make optimizer steps
progress.py     what a run tells of its steps
group_book.py   the state of every group, and the only place in which it changes
checkpoints.py  when a checkpoint is due, how it is written and committed
resume.py       how an interrupted run returns to its last commit
elastic.py scaling.py   engines that join and leave; how many there should be
balance.py      how many threads the trainer computes with
staleness.py    the queue between sampling and training, which bounds staleness and forms batches
places.py       the places of the batches, and to which capability each belongs
side.py         evaluations that are sampled beside the training
evaluation.py   the prompts and the accuracies of an evaluation beside the training
tally.py        the metrics of a step
start.py        what comes before the first step: the trainer's weights in the engines, and the comparison of both
"""
