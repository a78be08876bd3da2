"""Forecasts how fast RL runs on a cluster, before anyone has it: a simulation on the real queue of the controller.

config.py      the keys of a cluster file: devices, hosts, network, what is sampled
costs.py       how long each kind of work takes: records that hold seconds, wherever these come from
hardware.py    the costs from the shape of a model and the published figures of a device
calibration.py the costs from a run that was made
actors.py      a simulated engine and a simulated trainer
simulation.py  the events of an asynchronous run, on `StalenessQueue`
setting.py     what is simulated: a stage's config on a cluster; the same devices when models take turns
outcome.py     what a simulation comes to: rates, idle shares, the bottleneck
engines.py     how many engines are worth their cost, for a range of them
changes.py     which changes would help most
memory.py      what lies in the memory of a device
text.py        the forecast as text, with a drawing of who worked when

Left out: faults, evaluation during the training, environments of several turns, and what a host's CPUs do beside GPUs.
"""
