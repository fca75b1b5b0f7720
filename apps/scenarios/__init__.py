"""Scenarios that come with rlkit, as TOML files (profiles/scheduling/scenario.py says how they are written)."""
