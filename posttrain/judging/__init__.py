"""A model that rates texts for other parts: the filter's rows and RL's replies.

config.py      what the judge is asked, and what it may answer
prompts.py     a row as the judge's prompt, with everything that could leave its place escaped
verdicts.py    from the judge's answer to a verdict: a distribution over the labels, and one score
"""
