"""Built-in environments: async functions (session, row) that talk with the policy and give the reward.

calculator.py   the policy may have expressions computed
"""
