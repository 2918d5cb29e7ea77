"""Device time of a program by `jax.named_scope`, from a trace of one run.

The trace names the HLO instruction of each kernel; the compiled program names each instruction's scope. A fusion counts for
the scope of its root.
"""

from __future__ import annotations

import collections
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", re.MULTILINE)
_NOT_A_SCOPE = re.compile(
    r"jit|pjit|shard_map|while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr|checkpoint|scan|main|[a-z_]+\(.*\)"
)


def time_by_scope(run: Callable[[], Any], compiled: jax.stages.Compiled, folder: Path) -> list[tuple[str, float]]:
    """Times one run: (scope, seconds), longest first. The trace stays in `folder`, for xprof or Perfetto.

    Raises:
      RuntimeError: the trace has no instruction of the program.
    """
    jax.block_until_ready(run())
    known = set(folder.rglob("*.trace.json.gz"))
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(run())
    new = sorted(set(folder.rglob("*.trace.json.gz")) - known)
    if not new:
        raise RuntimeError(f"the profiler has written no trace to {folder}.")
    scopes = {name: scope_of(op) for name, op in _INSTRUCTION.findall(compiled.as_text() or "")}
    total: dict[str, float] = collections.defaultdict(float)
    for event in _device_events(json.loads(gzip.decompress(new[-1].read_bytes()))):
        total[scopes.get(event["args"]["hlo_op"], "(no scope)")] += event["dur"] * 1e-6
    if not total:
        raise RuntimeError("the trace has no instruction of the program: is CUPTI installed?")
    return sorted(total.items(), key=lambda item: -item[1])


def scope_of(op_name: str) -> str:
    """Extracts the named scopes from an instruction's `op_name`.

    >>> scope_of("jit(run)/shard_map/while/body/closed_call/mla/query/tq,qnk->tnk/dot_general")
    'mla/query'
    >>> scope_of("jit(run)/jit(main)/add")
    '(no scope)'
    """
    parts = [part for part in op_name.split("/")[:-1] if not _NOT_A_SCOPE.fullmatch(part) and "->" not in part]
    return "/".join(parts) or "(no scope)"


def _device_events(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Events with an instruction, of the GPUs, or without a GPU of the CPU threads. Loops are left out: their bodies count."""
    events = trace["traceEvents"]
    gpus = {e["pid"] for e in events if e.get("name") == "process_name" and "GPU" in e["args"].get("name", "")}
    have = [e for e in events if e.get("ph") == "X" and "hlo_op" in e.get("args", {})]
    have = [e for e in have if not re.match(r"(while|conditional|call)\b", e["args"]["hlo_op"])]
    return [e for e in have if e["pid"] in gpus] if gpus else have
