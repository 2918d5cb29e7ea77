from jax_mla_cp.config.errors import ConfigError


class TokenizerError(ConfigError):
    """A tokenizer or chat template that is absent, damaged, or does not fit its own settings, the model or the text."""
