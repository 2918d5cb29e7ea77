"""The rule by which a quantized matrix stays in FP8 in device memory, or is dequantized while it is loaded."""

from __future__ import annotations

from collections.abc import Iterable


def why_dequantized(
    shape: tuple[int, ...], ways: tuple[int, ...], block: tuple[int, int], reordered: Iterable[range] = ()
) -> str | None:
    """The reason why a matrix can't keep one scale for each block of the checkpoint; None: it can, and stays in FP8.

    >>> why_dequantized((7168, 2048), (1, 8), (128, 128))  # a shared expert's `down`, its inputs over tp=8
    >>> why_dequantized((7168, 2048), (1, 32), (128, 128))
    'the mesh cuts blocks'

    Args:
      shape: [N, K], or [2, F, K]: gate and up, each in blocks of its own.
      ways: the number of devices that divide each dimension.
      block: outputs and inputs that share a scale.
      reordered: ranges of outputs within which the loader changes the order.
    """
    sizes = zip(shape[-2:], ways[-2:], block, strict=True)
    if any(devices > 1 and size // devices % length for size, devices, length in sizes):
        return "the mesh cuts blocks"
    outputs = block[0]
    if len(shape) > 2 and shape[-2] % outputs:
        return "gate ends within a block, where up begins"
    if any(rows[0] // outputs != rows[-1] // outputs for rows in reordered):
        return "a head's roped rows lie in several blocks"
    return None
