"""The judge: a model that rates texts, which are rows for the filter and replies for RL.

    Row ─► prompts ─► Question ─► JudgeBackend.rate ─► Verdict, or Undecided with its reason

config.py      the keys: what the judge is asked, what it may answer, and where it runs
prompts.py     makes a Question of a row; the row's text cannot pass for a part of the prompt
verdicts.py    a Verdict (a distribution over the labels, and one score), or Undecided
cache.py       the file in which verdicts are kept, so that no question is asked twice
backend.py     the protocol JudgeBackend, and which of the two implementations a config means
engines.py     the judge on vLLM engines of the stage, asked through the rollout workers
endpoint.py    the judge at a server that speaks the chat completions protocol of OpenAI
forms.py       how such a server is asked for a label, and how its answer is read
requests.py    one request to it: the client, the key, retries, and errors in plain words
preflight.py   checks such a server before anything heavy starts
"""
