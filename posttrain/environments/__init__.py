"""Built-in environments: async functions (session, row) that talk with the policy and give the reward.

calculator.py      the policy may have expressions computed
guess_number.py    the policy guesses a number, and hears whether it is higher or lower
openenv.py         environments behind a server in the manner of OpenEnv
reasoning_gym.py   the scorers of reasoning-gym, as a reward
store.py           the policy may look up values in a store that the row holds
textarena.py       games of TextArena for one player
tool_use.py        the policy may call the tools that the YAML names
verifiers.py       environments of the package verifiers before version 0.4
verifiers_v1.py    environments of the package verifiers from version 0.4 on
"""
