"""Which prompts are sampled, and how hard each is.

config.py         the keys that say which prompts are drawn
source.py         the order in which prompts are drawn, each with a system instruction
profile.py        pass@k of every prompt with the starting policy
difficulty.py     the measured pass rates, and the store that runs share
fingerprints.py   what a measured pass rate depends on
prior.py          the prior belief about a prompt, fitted to the profile
curriculum.py     beliefs about pass rates, and the moving band from which prompts are drawn
refilter.py       which prompts are measured again during training
quotas.py         the share of each capability in a batch
lengths.py        check that prompt and reply fit into the engine
"""
