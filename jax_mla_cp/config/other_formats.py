"""Quantized formats of other programs: recognized, so that they are refused by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_NAMES = {
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fbgemm_fp8": "FBGEMM's FP8, with a scale for each output,",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "quark": "Quark",
}
"""Formats of other programs, by their `quant_method` (transformers' utils/quantization_config.py)."""

_MARKS = {
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
    ".g_idx": "GPTQ",
    ".qzeros": "AWQ",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
}
"""Formats by the ends of tensor names that they alone have. GPTQ has `.qzeros` too, so it goes before AWQ."""


def format_of_tensors(names: Iterable[str]) -> tuple[str, str] | None:
    """A format that this package can't read, told by a checkpoint's tensors, and the tensor that tells it; None if none does."""
    first: dict[str, str] = {}
    for name in names:
        for mark in _MARKS:
            if name.endswith(mark):
                first.setdefault(mark, name)
    return next(((_MARKS[mark], first[mark]) for mark in _MARKS if mark in first), None)


def refused_format(name: str) -> str:
    """The reason and the remedy for a checkpoint in a format that this package can't read."""
    return (
        f"{name} is not supported; this version reads FP8 in blocks and 4-bit compressed-tensors. Use the model's original "
        "checkpoint (DeepSeek-V3, R1 and Kimi K2: FP8 in blocks; Kimi K2 Thinking and K2.5: 4-bit compressed-tensors), or one "
        "in bfloat16."
    )


def refused_method(raw: Mapping[str, Any]) -> str | None:
    """The reason why a `quantization_config` is refused, from the key on, if it is a format that is known by name."""
    method = raw.get("quant_method")
    if method in ("modelopt", "modelopt_fp4"):
        algorithm = raw.get("quant_algo") or ("NVFP4" if method == "modelopt_fp4" else None)
        return f".quant_method={method!r}: {refused_format(_model_optimizer(algorithm))}"
    if isinstance(method, str) and method in _NAMES:
        return f".quant_method={method!r}: {refused_format(_NAMES[method])}"
    if method is None and "bits" in raw:
        return f": {refused_format('MLX')}"
    return None


def refuse_model_optimizer(raw: Mapping[str, Any]) -> None:
    """Refuses a checkpoint quantized by NVIDIA's Model Optimizer, which config.json may not mention.

    Args:
      raw: hf_quant_config.json (`modelopt/torch/export/unified_export_hf.py`); {} if there is none.

    Raises:
      ValueError: it names a format of weights.
    """
    part = raw.get("quantization", raw)
    algorithm = part.get("quant_algo") if isinstance(part, Mapping) else part
    if algorithm is not None:
        raise ValueError(f"quant_algo={algorithm!r}: {refused_format(_model_optimizer(algorithm))}")


def _model_optimizer(algorithm: object) -> str:
    return f"{algorithm or 'the format'} of NVIDIA's Model Optimizer"
