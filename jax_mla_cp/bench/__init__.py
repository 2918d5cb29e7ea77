"""Benchmarks: `python -m jax_mla_cp.bench COMMAND`; see `--help`, and docs/benchmarks.md for results.

Each command is the module of its name: `attention`, `layer`, `model`, `decode`, `scaling`, `load`, `host`, and `serve`, which
is a package. The other modules are what the commands share.
"""
