"""The model: Flax NNX modules of per-device code, and their public handle `Model` (jax_mla_cp/model/handle.py)."""
