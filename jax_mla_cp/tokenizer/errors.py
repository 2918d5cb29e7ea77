from jax_mla_cp.config.errors import ConfigError


class TokenizerError(ConfigError):
    """A tokenizer or chat template that is missing, damaged, or does not fit its configuration, the model or the text."""
