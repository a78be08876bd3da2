"""Strict configuration: YAML in, frozen pydantic models out, every problem of a file reported at once.

base.py        the base class of all sections, and how a file or an object is checked against one
yaml_core.py   reads YAML 1.2, without surprises such as `no` for false
fields.py      types of fields that many sections use

The other files hold the sections that several stages share, each file one subject: data.py, models.py, training.py,
engines.py, resources.py, rewards.py, trackers.py. A section of one stage only is in that stage's own `config.py`.
Nothing here imports torch, so that a config is read and checked in milliseconds.
"""
