"""`python -m jax_mla_cp.bench serve`: an open-loop load test of a running OpenAI server."""
