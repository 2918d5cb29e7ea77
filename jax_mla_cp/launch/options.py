"""`LaunchOptions`: the options that the programs share."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

from jax_mla_cp.attention import Implementation
from jax_mla_cp.batch.form import Form
from jax_mla_cp.config.errors import ConfigError, check_choice, check_whole
from jax_mla_cp.config.quantization import Fp8Compute, Weights
from jax_mla_cp.distributed.cluster_options import ClusterOptions
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.platform import Platform
from jax_mla_cp.step.planner import MAX_DRAFT_TOKENS

EpAxes = Literal["auto", "none", "tp", "tp,cp", "tp,cp,dp"]
Dtype = Literal["auto", "float32", "bfloat16"]
Speculative = Literal["off", "mtp"]

_INT32_MAX = 2**31 - 1
"""Token and page counts are int32 on the device."""


@dataclasses.dataclass(frozen=True)
class LaunchOptions(ClusterOptions):
    """Model, devices, cache and schedule: the options that the programs share. A field is the flag of the same name.

    Raises:
      ConfigError: a number out of bounds, or options that exclude each other. The functions that take the other named choices
        check them: `load`, `Planner.create`, `platform.choose`.
    """

    model: Path | None = None
    """Model directory. None: the built-in model."""
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    platform: Platform = "auto"
    dtype: Dtype = "auto"
    weights: Weights = "auto"
    fp8_compute: Literal["auto"] | Fp8Compute = "auto"
    ep_axes: EpAxes = "auto"
    attention: Implementation = "auto"
    form: Form = "auto"
    page_size: int = 64
    kv_pages: int | None = None
    """Pages per dp group. None: what `memory_fraction` allows."""
    memory_fraction: float | None = None
    """None: `platform.default_memory_budget`."""
    prefill_chunk: int = 2048
    max_model_len: int | None = None
    """None: the smaller of the model's length and what the pages hold."""
    max_running: int = 32
    speculative: Speculative = "off"
    draft_tokens: int | None = None
    """None: 1 with speculation. DeepSeek-V3's layer is trained to guess one token, and 85 to 90% of these are right
    (arXiv:2412.19437, section 5.4.3); those after it are right less often, and each costs a pass of the layer."""
    compile_cache: str = "auto"
    """A directory, "auto" (`platform.default_compile_cache`) or "off"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("speculative", self.speculative, get_args(Speculative))
        check_whole("page_size", self.page_size, 1, 65536)
        check_whole("prefill_chunk", self.prefill_chunk, 1, _INT32_MAX)
        check_whole("max_running", self.max_running, 1, 4096)
        if self.kv_pages is not None:
            check_whole("kv_pages", self.kv_pages, 1, _INT32_MAX)
        if self.max_model_len is not None:
            check_whole("max_model_len", self.max_model_len, 2, _INT32_MAX)  # a prompt token and a sampled one
        fraction = self.memory_fraction
        if fraction is not None and not (math.isfinite(fraction) and 0 < fraction <= 1):
            raise ConfigError("memory_fraction", f"must be above 0 and at most 1, got {fraction}. Try 0.9.")
        if not self.compile_cache:
            raise ConfigError("compile_cache", "must be a directory, auto or off, got ''.")
        if self.draft_tokens is not None:
            if self.speculative == "off":
                raise ConfigError("draft_tokens", "without speculation there are no drafts. Add speculative='mtp'.")
            check_whole("draft_tokens", self.draft_tokens, 1, MAX_DRAFT_TOKENS)
        elif self.speculative == "mtp":
            object.__setattr__(self, "draft_tokens", 1)

    @property
    def model_name(self) -> str:
        """The model directory's name, without spaces."""
        name = "" if self.model is None else "-".join(self.model.resolve().name.split())
        return name or "jax-mla-cp-tiny"
