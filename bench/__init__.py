"""Benchmarks of soap_opt; see README.md beside this file."""
