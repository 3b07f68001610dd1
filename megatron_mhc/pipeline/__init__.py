"""Pipelines: the 1F1B schedule whose messages overlap, its links and CUDA streams."""
