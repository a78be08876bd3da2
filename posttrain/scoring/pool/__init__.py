"""Reward functions in killable processes of their own.

pool.py             pairs in, scores out, over any number of processes
slot.py             one slot of the pool: its process, deadline and replacement
process.py          starting, reaching and killing a process
reward_process.py   what runs in it
wire.py             what travels between pool and process
"""
