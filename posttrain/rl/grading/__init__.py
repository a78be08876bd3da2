"""From rollouts to rewards and advantages.

config.py      the keys that say what a rollout is worth
verifiers.py   the reward function of the config, and whether the rows carry what it needs
judge.py       a judge model whose verdict on each reply the reward can read
groups.py      scores, advantages, and whether a group is worth training on
alarm.py       too many rollouts without a score: say so
"""
