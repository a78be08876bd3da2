"""Scoring: reward plug-ins found by name and run in killable processes. Imports nothing heavy."""
