"""Communication time of a step, from a link model: on one GPU the collectives are mocked and take no time.

tp is inside a node, over NVLink; cp goes across nodes, with one network card per GPU. Rates are per GPU and direction and fully
used; latencies, a few microseconds per collective, are not counted.
"""

from __future__ import annotations

import dataclasses
import re

from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import MeshShape

NVLINK = 360e9
NETWORK = 50e9
STATED = "link model: 360 GB/s NVLink within tp, 50 GB/s network across cp, per GPU and direction; no latencies."


@dataclasses.dataclass(frozen=True)
class Communication:
    """Communication of a whole model's step, in seconds."""

    latents: float
    """All-gathers of the latents over cp."""
    sums: float
    """All-reduces over tp: two per layer, and the embedding's."""
    experts: float
    """All-gathers of tokens and reduce-scatters of results, if cp divides the experts too."""

    @property
    def total(self) -> float:
        return self.latents + self.sums + self.experts

    def exposed(self, hidden: float) -> float:
        """Communication that compute doesn't hide, if `hidden` seconds of compute overlap with the latent gathers.

        Nothing overlaps with the other collectives.
        """
        return max(0.0, self.latents - hidden) + self.sums + self.experts


def communication(config: ModelConfig, mesh: MeshShape, ep_axes: str, tokens: int, itemsize: int = 2) -> Communication:
    """Models the communication of a step of `tokens` new tokens, divided over cp."""
    c = config
    per_rank = tokens / mesh.cp
    others = (mesh.cp - 1) / mesh.cp
    latents = others * tokens * c.latent_dim * itemsize / NETWORK
    one_sum = 2 * (mesh.tp - 1) / mesh.tp * per_rank * c.hidden_size * itemsize / NVLINK
    experts = 0.0
    if "cp" in ep_axes.split(","):
        # Tokens, expert ids and weights go out; sums of the same width as the tokens come home.
        experts = others * tokens * (2 * c.hidden_size * itemsize + 8 * c.experts_per_token) / NETWORK
    layers = c.num_layers
    return Communication(layers * latents, (2 * layers + 1) * one_sum, c.num_moe_layers * experts)


def query_seconds(config: ModelConfig, mesh: MeshShape, tokens: int, rate: float) -> float:
    """Seconds of the query projections of all layers at `rate` FLOP/s: the compute that overlaps with the latent gathers."""
    c = config
    heads = c.num_heads / mesh.tp * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    width = c.hidden_size * heads if c.q_lora_rank is None else c.q_lora_rank * (c.hidden_size + heads)
    return c.num_layers * 2 * tokens / mesh.cp * width / rate


_MATMUL = re.compile(r'dot_general|gemm|custom_call_target="(w8a8|few_rows\w*)"')


def work_beside_gather(text: str, rows: int, width: int) -> bool | None:
    """Reads from a compiled program's schedule whether all its all-gathers of `[rows, width]` overlap with matmuls.

    Returns: True if each has a matmul between its start and its end; None if there is no asynchronous one (on a CPU all block).
    """
    found: list[bool] = []
    lines = text.splitlines()
    for at, line in enumerate(lines):
        start = re.match(r"\s*%?([\w.-]+) = .*\b(?:all-gather-start|async-start)\(", line)
        if not start or "all-gather" not in line or f"[{rows},{width}]" not in line:
            continue
        end = re.compile(rf"\b(?:all-gather-done|async-done)\(.*%?{re.escape(start[1])}\)")
        beside = []
        for other in lines[at + 1 :]:
            if end.search(other) or other.startswith("}"):
                break
            beside.append(other)
        found.append(any(_MATMUL.search(other) for other in beside))
    return all(found) if found else None
