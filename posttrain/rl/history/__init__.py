"""The records that an RL run keeps, and how an interrupted run continues from them.

ledger.py       the state of every group
ledger_file.py  the ledger's SQLite file, to which changes are written in transactions
replies.py      encodes replies as bytes, for the ledger
archive.py      writes rollouts to parquet files, for people, the report and DPO
recorded.py     reads the archive's rollouts as typed records, for notebooks
recovery.py     finds where an interrupted run stood, from the ledger and the last checkpoint
audit.py        checks that ledger, checkpoints and archive agree
replay.py       trains on the recorded batches again, to compare the weights
"""
