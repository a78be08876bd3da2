"""Episodes: rollouts of several turns, in which an environment talks with the policy.

    environment process                            stage
    async def env(session, row) ── Ask ──► pool.py ──► rollouter.py ──► session of the rollout ──► engine
          session.py            ◄─ Told ──             conversation.py: messages <-> token ids
                                                       calls.py: token ids -> calls of tools

session.py            what an environment is given; runs in its process
environment_process.py   the program of such a process
wire.py               the messages between process and stage
pool.py process.py    the environment processes; one of them, which can be killed, and the episodes in it
rollouter.py talk.py  makes a rollout of an episode; one episode from the stage's side
histories.py          the conversations of an episode as a tree, for agents that send a whole history with each call
conversation.py       what the policy reads next: a checked suffix, or a new branch
rehearsal.py          an episode whose policy follows a script, for the tests of an environment
calls.py              reads and checks calls
tools.py schemas.py   which tools the policy is shown; the schema of a function
toolbox/              tools that the run provides, and their calls
agents/               programs that talk with the policy over HTTP
"""
