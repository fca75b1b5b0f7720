"""Scheduling of several models on the units of one machine: workloads, a simulator, metrics, traces."""
