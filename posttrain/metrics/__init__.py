"""Metric values: JSON lines, intervals, events."""
