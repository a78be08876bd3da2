"""Agents as they are: programs that talk with the policy through the client of OpenAI.

    environment process                                                                        stage
    agent(session, row) ── starts ──► the agent's process ── HTTP ──► gateway.py ── session ──► talk.py, histories.py
          ▲                                │ its output, its exit code
          └───────────── the reward ◄──────┘

environment.py   the built-in environment `agent`: one process an episode, and its reward
process.py       that process: its variables, its input and output, its end
gateway.py       the server on loopback that all agents of an environment process call, each with the key of its episode
protocol.py      the requests that it takes and its answers, in OpenAI's form

All of it runs in the environment process, so a gateway that dies is a lost environment process: the episodes begin
again. Left out: embeddings, images, several choices for one call, calls that force a tool or a form.
"""
