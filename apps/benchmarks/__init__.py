"""Benchmarks: programs that print what this project claims, each run with `python -m rlkit.apps.benchmarks.NAME`."""
