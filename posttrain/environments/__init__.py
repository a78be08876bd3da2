"""Built-in environments: async functions (session, row) that talk with the policy and give the reward.

calculator.py      the policy may have expressions computed
openenv.py         environments behind a server in the manner of OpenEnv
reasoning_gym.py   the scorers of reasoning-gym, as a reward
tool_use.py        the policy may call the tools that the YAML names
verifiers.py       environments of the package verifiers
"""
