"""The model: Flax NNX modules of per-device code (decoder.py), and `Model`, their weights on a mesh (loaded_model.py)."""
