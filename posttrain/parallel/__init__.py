"""Training in one process or several, which are called ranks: Ray actors with a DeepSpeed engine in each.

ranks.py     start the ranks, call a method on all of them, end them
rank.py      the process of one rank
engine.py    join the ranks, make a DeepSpeed engine of a model, check a layout
tensors.py   read and write whole tensors, however ranks and experts divide them
state.py     save and load training state, independent of the layout
export.py    write a model folder
away.py      the model folder for a rank on another host than the home host
ending.py    end a process that is a rank
"""
