"""`python -m jax_mla_cp.bench serve`: load on a running OpenAI server, sent at times that are fixed in advance."""
