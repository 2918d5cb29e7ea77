"""Benchmarks: `python -m jax_mla_cp.bench attention | layer | model | decode`. `--help` tells how and what."""
