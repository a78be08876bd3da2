"""What was recorded of a run, and how a run goes on from it.

ledger.py     every group and its state, in SQLite
replies.py    replies as bytes, for the ledger
archive.py    rollouts as parquet files, for people, the report and DPO
recorded.py   the archive's rollouts as typed records, for notebooks
recovery.py   from ledger and checkpoint back to where a run stood
audit.py      is what the ledger says consistent with the checkpoints and with itself?
replay.py     the recorded batches trained on again, to compare the weights
"""
