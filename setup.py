"""Everything is in pyproject.toml; compiled extensions, which need code to decide what can be built, are declared here."""

from setuptools import setup

setup()
