"""Reward functions in killable processes of their own.

pool.py             scores pairs of rollout and row, over any number of processes
item.py             a rollout in a pool, and who gets its score
siblings.py         holds replies back when others to the same prompt hang
slot.py             keeps one process of the pool alive, feeds it and watches its deadlines
stats.py            what the pool counts
process.py          starts one process, sends to it, reads from it and kills it; environments have such processes too
pipes.py            what a program in such a process needs to talk to its pool
reward_process.py   the program that runs in such a process
wire.py             the messages between pool and process
"""
