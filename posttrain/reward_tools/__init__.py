"""Tools for plug-ins: try a reward on replies, audit it with controls, watch an environment, begin a new plug-in.

trial.py     scores texts with a reward in its killable processes, with its limits; reads replies from a file
controls.py  replies that are wrong whatever the prompt is, and ways to state the right answer
audit.py     scores the controls, and concludes whether the reward can be fooled
episode.py   one episode of an environment, with an engine
install.py   an interpreter of its own for a plug-in
template.py  a new reward or environment with its test
"""
