"""Benchmarks by subject, listed in README.md; scripts put the repository on their search path."""
