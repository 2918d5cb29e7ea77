"""`StepInputs`: everything that the devices are given in a step."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int32, UInt32

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
    page_table: Int32[np.ndarray, "dp*I W"] | None
    """The whole page table, to be placed before the step. None: the changes in the batch are all."""
    table_checksum: UInt32[np.ndarray, " dp"]
    """The checksum of each dp group's page table after the step's changes, which the devices must return."""
