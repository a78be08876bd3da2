"""Scoring: reward plug-ins that are found by name and run in processes which can be killed. Imports nothing heavy.

plugins/   find a reward, check it without running it, and tell which fields of a row it needs
pool/      reward processes that score rollouts, with a deadline for each
remote/    the pool as a Ray actor, which is replaced when it is lost
sandbox/   run programs that a model wrote
"""
