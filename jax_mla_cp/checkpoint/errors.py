from jax_mla_cp.config.errors import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that can't be loaded: a damaged file, or tensors other than those that config.json describes."""
