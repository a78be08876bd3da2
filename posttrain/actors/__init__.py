"""How Ray actors and other processes are called, watched and ended.

calls.py       await one remote call, with a deadline or as long as the actor answers a heartbeat
losses.py      which errors mean that an actor is gone, as opposed to a fault that another actor would have too
lane.py        send work to one actor in batches, and fetch its results in batches
processes.py   end a process for certain, or every process that carries a mark
garbage.py     how often Python's garbage collector runs: not during large imports, rarely where records are many
shared_memory.py  the files of shared memory that processes have mapped
parent.py      a process that ends when the process that started it ends
"""
