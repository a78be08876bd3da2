"""Finds the packages for the wheel. Everything else about packaging is in pyproject.toml.

The list cannot be static: `packages.find` there does not see the three top-level folders (rewards, pipelines, configs)
that are shipped inside the package, and an explicit list would be forgotten when a folder is added.
"""

from setuptools import find_namespace_packages, setup

MAPPED = ["posttrain.rewards", "posttrain.rewards.expressions", "posttrain.pipelines", "posttrain.configs"]

setup(packages=[*find_namespace_packages(include=["posttrain", "posttrain.*"], exclude=["*.__pycache__*"]), *MAPPED])
