"""Strict configuration: YAML in, frozen pydantic models out, every problem of a file reported at once."""
