"""Tools for a reward without an engine: try it on replies, audit it with controls, begin a new one from a template.

trial.py     scores texts with a reward in its killable processes, with its limits; reads replies from a file
controls.py  replies that are wrong whatever the prompt is, and ways to state the right answer
audit.py     scores the controls, and concludes whether the reward can be fooled
template.py  a new plug-in with its test
"""
