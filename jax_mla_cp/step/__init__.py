"""The compiled step: the model and the sampler under one `shard_map`, planned, run and read back."""
