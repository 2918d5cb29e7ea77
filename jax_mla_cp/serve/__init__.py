"""The OpenAI-compatible server: `python -m jax_mla_cp.serve --help`."""
