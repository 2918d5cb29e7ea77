"""The rope objects of config.json -> `RopeConfig`.

transformers 4 and DeepSeek's own files write `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters`
(`RotaryEmbeddingConfigMixin` in its modeling_rope_utils.py). Programs disagree about an object that contradicts itself, so such
an object is refused rather than read in one of the ways.
"""

from __future__ import annotations

from collections.abc import Mapping

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.keys import Keys, agreed
from jax_mla_cp.config.rope import RopeConfig

_ORIGINAL = "original_max_position_embeddings"
_YARN = ("factor", _ORIGINAL, "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_USED: dict[str, tuple[str, ...]] = {"default": (), "yarn": _YARN}
"""By type: the keys that decide the angles, beside rope_theta."""

_NEUTRAL = {"partial_rotary_factor": (1,), "truncate": (True,)}
"""Keys of which this package implements the neutral value."""


def rope_config(keys: Keys) -> RopeConfig:
    """Reads the rope of a text model.

    Raises:
      ConfigError: another type than plain rope and YaRN, none although there are keys of one, keys that the type does not use,
        an object for each kind of layer, or two values for the same thing.
    """
    new, old = (_rope_object(keys, name) for name in ("rope_parameters", "rope_scaling"))
    _check_same(new, old)
    scaling = new if new.raw else old
    theta = _theta(keys, new, old)
    interleaved = keys.flag("rope_interleave", True)
    _neutral(keys)
    if scaling.raw.get("rope_type", "default") == "default":
        return RopeConfig(theta=theta, interleaved=interleaved)
    return _yarn(keys, scaling, theta, interleaved)


def _rope_object(keys: Keys, name: str) -> Keys:
    """One of the two objects, without nulls, its type under the key `rope_type`; empty if it is not there."""
    raw = {key: value for key, value in keys.part(name).items() if value is not None}
    nested = [key for key, value in raw.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            "config.json",
            f"{name} has an object for each kind of layer ({', '.join(nested)}), which is not supported; this version runs one "
            "rope in all layers.",
        )
    kind = raw.pop("type", None)
    if kind is not None and raw.setdefault("rope_type", kind) != kind:
        raise ConfigError(
            "config.json", f"{name} has type={kind!r} and rope_type={raw['rope_type']!r}, which differ. Keep one."
        )
    found = Keys(raw, f"{name}.")
    _check_keys(found, name)
    return found


def _check_keys(rope: Keys, name: str) -> None:
    """Refuses a type that this package does not implement, and keys that the type does not use."""
    rest = sorted(rope.raw.keys() - {"rope_type", "rope_theta", *_NEUTRAL})
    kind = rope.raw.get("rope_type")
    if kind is None and rest:
        raise ConfigError(
            "config.json",
            f'{name} has {", ".join(rest)} and no type. Add its type: "rope_type": "yarn" for YaRN, or remove {name} for '
            "plain rope.",
        )
    kind = kind or "default"
    if not isinstance(kind, str) or kind not in _USED:
        raise ConfigError(
            "config.json",
            f"{name}: the rope type {kind!r} is not supported; this version runs 'default' (plain rope) and 'yarn'.",
        )
    if unused := [key for key in rest if key not in _USED[kind]]:
        listed = ", ".join(f"{key}={rope.raw[key]!r}" for key in unused)
        used = f"only {', '.join(('rope_theta', *_USED[kind]))}"
        raise ConfigError(
            "config.json", f"{name}: the rope type {kind!r} with {listed} is not supported; this version reads {used}."
        )
    _neutral(rope)


def _neutral(keys: Keys) -> None:
    for key, values in _NEUTRAL.items():
        if keys.has(key) and keys.raw[key] not in values:
            raise ConfigError(
                "config.json", f"{keys.path}{key}={keys.raw[key]!r} is not supported; this version runs {values[0]!r}."
            )


def _check_same(new: Keys, old: Keys) -> None:
    if not (new.raw and old.raw):
        return
    differ = [key for key in {**new.raw, **old.raw} if key != "rope_theta" and new.raw.get(key) != old.raw.get(key)]
    if differ:
        raise ConfigError(
            "config.json",
            f"rope_parameters and rope_scaling differ in {', '.join(differ)}: which is right can't be told. Keep one.",
        )


def _theta(keys: Keys, *objects: Keys) -> float:
    given = agreed({o.path + "rope_theta": o.number("rope_theta") for o in (keys, *objects) if o.has("rope_theta")})
    if given == 0:
        raise ConfigError("config.json", "rope_theta must be above 0, got 0.")
    return 10000.0 if given is None else float(given)


def _yarn(keys: Keys, scaling: Keys, theta: float, interleaved: bool) -> RopeConfig:
    # Some files have it beside the object; transformers then ignores the object's own.
    original = agreed({o.path + _ORIGINAL: o.whole(_ORIGINAL) for o in (scaling, keys) if o.has(_ORIGINAL)})
    if not original:
        raise ConfigError("config.json", f"YaRN needs {scaling.path}{_ORIGINAL}, a whole number above 0.")
    factor = scaling.number("factor", keys.whole("max_position_embeddings") / original)
    if factor < 1:
        raise ConfigError("config.json", f"{scaling.path}factor must be at least 1, got {factor:g}.")
    fast, slow = scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0)
    if not 0 < slow <= fast:
        raise ConfigError(
            "config.json",
            f"{scaling.path}beta_slow must be above 0 and at most beta_fast, got beta_slow={slow:g}, beta_fast={fast:g}.",
        )
    return RopeConfig(
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=fast,
        beta_slow=slow,
        mscale=scaling.number("mscale", 0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0),
        yarn=True,
        interleaved=interleaved,
    )
