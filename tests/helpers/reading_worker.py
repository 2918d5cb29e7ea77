"""One of several processes that load a checkpoint: `python -m tests.helpers.reading_worker ADDRESS COUNT INDEX CHECKPOINT`.

It prints what it read as JSON: the tensors' names, the bytes of their parts that its devices keep, and the bytes of the files that
it touched.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax

import jax_mla_cp as mla
from jax_mla_cp.checkpoint.parameter import Parameter
from jax_mla_cp.checkpoint.tensor_source import SafetensorsSource


def touched(directory: str) -> int:
    """Bytes of the directory's mapped files that this process has read, in whole pages."""
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = directory in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def main(address: str, count: str, index: str, checkpoint: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2 // int(count))
    if int(count) > 1:
        jax.distributed.initialize(address, int(count), int(index))
    names: set[str] = set()
    kept: dict[str, int] = {"experts": 0, "others": 0}
    source_read, read_shard = SafetensorsSource.read, Parameter.read_shard

    def read(self: SafetensorsSource, name: str) -> Any:
        names.add(name)
        sources.append(self)
        return source_read(self, name)

    def shard(self: Parameter, *given: Any) -> Any:
        part = read_shard(self, *given)
        kept["experts" if self.routed else "others"] += part.nbytes
        return part

    sources: list[SafetensorsSource] = []  # else the files are unmapped before they are looked at
    SafetensorsSource.read, Parameter.read_shard = read, shard  # type: ignore[method-assign, assignment]
    mla.load(checkpoint, mesh=mla.make_mesh("tp=2"), dtype="float32", ep_axes="tp", progress=False)
    print(json.dumps({"names": sorted(names), **kept, "touched": touched(checkpoint)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
