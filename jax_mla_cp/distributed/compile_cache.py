"""The compile cache of several processes. JAX writes it from process 0 alone, so that a folder that all share has one writer;
a process with a folder of its own would compile everything again at each start."""

from __future__ import annotations

import contextlib
import logging
import secrets
from pathlib import Path
from types import SimpleNamespace

import jax

from jax_mla_cp.distributed.cluster import Cluster

log = logging.getLogger(__name__)


def write_own_compile_cache(cluster: Cluster, directory: Path) -> None:
    """Finds out which processes have process 0's folder; one that has not, or whose programs have other keys, writes too. Every
    process must call it."""
    probe = f".shared-{secrets.token_hex(8)}"
    if cluster.leads:
        (directory / probe).touch()
    name = cluster.store.exchange("compile cache", probe)[0]
    shared = (directory / name).exists()
    cluster.wait_for_all("compile cache probed")
    if cluster.leads:
        with contextlib.suppress(FileNotFoundError):
            (directory / name).unlink()
    elif shared and jax.default_backend() == "gpu":
        log.info("compile cache: %s, shared with process 0, which writes it", directory)
    else:  # on CPU devices a program's key is another one in each process, so that a folder may be shared by several writers
        log.info("compile cache: %s, to which this process writes too", directory)
        _write_as_process_0()


def _write_as_process_0() -> None:
    """JAX decides by the process id that its compiler module sees (jax/_src/compiler.py, `_cache_write`), as does XLA's cache of
    autotuning results beside it."""
    from jax._src import compiler, distributed

    client = distributed.global_state.client
    setattr(compiler, "distributed", SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=client)))  # noqa: B010
