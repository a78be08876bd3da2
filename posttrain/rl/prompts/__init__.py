"""Which prompts are sampled, and how hard each is.

config.py         the keys that say which prompts are drawn
source.py         the prompt of each group, with a system instruction
selection.py      the choice of the next prompt, by the chance that its group has an advantage
beliefs.py        what is known about the pass rate of each prompt
prior.py          the prior belief, fitted to the prompts seen so far
profile.py        pass@k of every prompt with the starting policy, for those who ask for it
band.py           the prompts of a profile whose pass rate lies in a band
measured.py       pass rates and pass@k from the first groups of the training
difficulty.py     the measured pass rates, and the store that runs share
fingerprints.py   what a measured pass rate depends on
quotas.py         the share of each capability in a batch
kept.py           the token ids of prompts, rendered once
lengths.py        check that prompt and reply fit into the engine
"""
