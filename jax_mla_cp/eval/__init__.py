"""Does a model still read its whole context? `python -m jax_mla_cp.eval`, see README.md."""
