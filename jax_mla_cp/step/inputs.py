"""`StepInputs`: everything that the devices are given in a step."""

from __future__ import annotations

import dataclasses

from jax_mla_cp.batch.packing import DeviceBatch
from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.step.logit_bias import HostBias


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """A step's inputs on the host. Processes that run the same inputs in the same order have the same cache and results."""

    shape: StepShape
    """Names the program."""
    batch: DeviceBatch
    """Packed NumPy arrays of all devices."""
    bias: HostBias | None
