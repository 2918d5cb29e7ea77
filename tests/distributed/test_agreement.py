"""Processes that differ end with one sentence that names the process, its host, the field and both values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jax_mla_cp.checkpoint import CheckpointError
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.distributed.agreement import agree
from jax_mla_cp.distributed.cluster import Cluster
from jax_mla_cp.distributed.store import Store
from jax_mla_cp.launch import agreement
from jax_mla_cp.launch.agreement import agree_on_settings
from jax_mla_cp.launch.devices import Devices
from jax_mla_cp.launch.options import LaunchOptions
from jax_mla_cp.mesh import MeshShape
from tests.helpers.fake_cluster import Coordination, cluster


@dataclasses.dataclass
class Member:
    """The part of a `Member` that `agree` needs."""

    cluster: Cluster
    expecting: bool = False

    @contextlib.contextmanager
    def expect_exit(self) -> Iterator[None]:
        self.expecting = True
        yield
        self.expecting = False


def agreed(*facts: dict[str, object]) -> list[str | None]:
    """The error of each process; None: all is well."""
    service, count = Coordination(len(facts)), len(facts)
    members = [Member(cluster(service, i, count)) for i in range(count)]

    def run(i: int) -> str | None:
        try:
            agree(members[i], "settings", facts[i])  # type: ignore[arg-type]
        except ConfigError as error:
            assert members[i].expecting, "peers that end now are no failure"
            return str(error)
        assert not members[i].expecting
        return None

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_equal_processes_agree() -> None:
    facts: dict[str, object] = {"mesh": MeshShape(tp=2), "page_size": 64, "kv_pages": None}
    assert agreed(facts, dict(reversed(facts.items())), facts) == [None] * 3


def test_the_first_difference_is_named_alike_by_all() -> None:
    first: dict[str, object] = {"version": "1", "page_size": 64, "form": "auto"}
    told = agreed(first, first, first | {"page_size": 32, "form": "absorbed"}, first | {"form": "expanded"})
    assert told == [
        "page_size: must be the same in all processes: process 2 (host-2) has 32, process 0 (host-0) has 64. Start all with the "
        "same command, version and files."
    ] * len(told)


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        ({"a": 1}, {"a": None}, "a: must be the same in all processes: process 1 (host-1) has None, process 0"),
        ({"a": 1, "b": 2}, {"a": 1}, "b: must be the same in all processes: process 1 (host-1) has none, process 0"),
        ({"a": 1}, {"a": 1, "c": 3}, "c: must be the same in all processes: process 1 (host-1) has 3, process 0"),
        ({"a": "x" * 500}, {"a": "y" * 500}, f"a: must be the same in all processes: process 1 (host-1) has {'y' * 200}..."),
    ],
)  # fmt: skip
def test_what_only_one_has_differs(first: dict[str, object], other: dict[str, object], message: str) -> None:
    told = agreed(first, other)
    assert told[0] == told[1] and told[0] is not None and told[0].startswith(message)


def test_each_agreement_is_its_own() -> None:
    """The same words may be exchanged again."""
    service = Coordination(2)
    stores = [Store(service, i, 2) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for turn in range(3):
            values = list(pool.map(lambda store, turn=turn: store.exchange("word", f"{turn} {id(store)}"), stores))
            assert values == [[f"{turn} {id(store)}" for store in stores]] * 2


def test_a_process_that_does_not_answer_is_named() -> None:
    store = Store(Coordination(2), 0, 2)
    with pytest.raises(ConfigError) as refused:
        store.read("settings 1", 1, timeout=0.1)
    assert str(refused.value) == (
        "coordinator: process 1 did not answer (settings 1): DEADLINE_EXCEEDED: jax_mla_cp/settings 1/1. Its own log may say why."
    )


def test_the_smallest_budget_decides() -> None:
    service = Coordination(3)
    clusters = [cluster(service, i, 3) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda c: c.smallest_budget(100 - c.process_id), clusters)) == [98] * 3


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`facts(options)` gives what `agree_on_settings` compares."""
    seen: dict[str, object] = {}
    monkeypatch.setattr(agreement, "agree", lambda member, about, facts: seen.update(facts))

    def of(options: LaunchOptions) -> dict[str, object]:
        seen.clear()
        agree_on_settings(options, Devices("cpu", None, object()))  # type: ignore[arg-type]
        return dict(seen)

    return of


AT: dict[str, Any] = {"coordinator": "10.0.0.1:8476", "num_processes": 2}
CHANGED: dict[str, Any] = {
    "mesh": MeshShape(tp=2),
    "platform": "cpu",
    "dtype": "bfloat16",
    "weights": "bf16",
    "fp8_compute": "w8a16",
    "ep_axes": "tp",
    "attention": "xla",
    "form": "absorbed",
    "page_size": 32,
    "kv_pages": 7,
    "prefill_chunk": 64,
    "max_model_len": 99,
    "max_running": 3,
    "speculative": "mtp",
    "heartbeat_timeout": 5.0,
    "allow_tp_across_hosts": True,
    "num_processes": 3,
}


@pytest.mark.parametrize("field", CHANGED)
def test_each_flag_that_matters_is_compared(field: str, facts: Any) -> None:
    plain = facts(LaunchOptions(**AT, process_id=1))
    assert facts(LaunchOptions(**(AT | {field: CHANGED[field]}), process_id=0))[field] != plain[field]


def test_what_is_each_processs_own_is_not_compared(facts: Any, tmp_path: Path) -> None:
    plain = LaunchOptions(**AT, process_id=0)
    own: dict[str, Any] = {"process_id": 1, "local_devices": (1,), "cluster_key_file": tmp_path, "compile_cache": "off"}
    changed = dataclasses.replace(plain, **own, coordinator="node0:8476", memory_fraction=0.5)
    assert facts(plain) == facts(changed)


def test_every_field_is_compared_or_each_processs_own() -> None:
    """A new flag is compared, unless somebody writes it into the list of those that are not."""
    fields = {field.name for field in dataclasses.fields(LaunchOptions)}
    assert fields >= agreement._OWN_FLAGS
    assert fields - agreement._OWN_FLAGS == CHANGED.keys() | {"draft_tokens"}


def test_versions_config_and_files_are_compared(facts: Any, tmp_path: Path) -> None:
    for file in DIRECTORY.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (tmp_path / file.name).symlink_to(file)
    options = LaunchOptions(**AT, process_id=0)
    before = facts(dataclasses.replace(options, model=tmp_path))
    assert {
        "jax_mla_cp",
        "jax",
        "runtime",
        "jaxlib",
        "device",
        "config.json: num_layers",
        "tokenizer.json",
    } <= before.keys()
    assert all(before[k] == v for k, v in facts(options).items()), "a copy at another place is the same model"
    tokenizer = tmp_path / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.unlink()
    tokenizer.write_text(text + " ")
    after = facts(dataclasses.replace(options, model=tmp_path))
    assert {name for name in before if before[name] != after[name]} == {"tokenizer.json"}


def test_a_half_converted_checkpoint_is_called_that(facts: Any, tmp_path: Path) -> None:
    """Its config.json is copied last, and its absence is not the problem."""
    (tmp_path / "weights" / "state").mkdir(parents=True)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="half-converted"):
        facts(LaunchOptions(**AT, process_id=0, model=tmp_path))


def test_a_process_that_is_alone_compares_nothing() -> None:
    agree_on_settings(LaunchOptions(model=Path("/nonexistent")), Devices("cpu", None, None))  # type: ignore[arg-type]
