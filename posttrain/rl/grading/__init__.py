"""From rollouts to rewards and advantages.

config.py      the keys of reward, judge, advantage and loss
verifiers.py   the reward that the config asks for, and the check that rows have the fields that it needs
judge.py       a judge model, whose verdict on each reply the reward can read
groups.py      scores, advantages, and the decision whether a group is trained on
alarm.py       an alarm for too many rollouts without a score
"""
