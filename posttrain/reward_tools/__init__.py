"""A reward by itself, without an engine: tried on replies, audited with controls, and begun from a template.

trial.py     has a reward score texts in its killable processes, with its limits; replies from a file
controls.py  replies that are wrong whatever the prompt is, and ways to state the right answer
audit.py     scores the controls, and says whether the reward can be fooled
template.py  a new plug-in with its test
"""
