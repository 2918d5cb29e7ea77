"""ffi/fetch_fa3.py: the archives and checkouts it accepts and refuses, without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "ffi" / "fetch_fa3.py"


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, with an empty cache and no way to download anything."""
    monkeypatch.delenv("FA3_SOURCE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # ffi/ is no package
    spec = importlib.util.spec_from_file_location("fetch_fa3", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def offline(target: Path) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module, "download", offline)
    return module


def archive(fetch: ModuleType, leave_out: str | None = None) -> bytes:
    """A small archive of the right shape, with some files that must not be unpacked."""
    prefix = f"{fetch.TREE}/"
    names = [prefix + name for name in fetch.REQUIRED if name != leave_out]
    names += [prefix + "csrc/cutlass/LICENSE.txt"]
    names += [prefix + "hopper/instantiations/much.cu", prefix + "csrc/other.cu", prefix + "hopper/../../../../out.h"]
    names += ["/absolute.h", "../above.h", "xformers-0.0.33.post2/setup.py"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            content = name.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo(prefix + "hopper/link.h")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


def serve_archive(
    monkeypatch: pytest.MonkeyPatch, fetch: ModuleType, content: bytes, pinned: bool = True
) -> list[Path]:
    """Makes downloads give `content`. Returns the list of their targets."""
    downloads: list[Path] = []

    def download(target: Path) -> None:
        downloads.append(target)
        target.write_bytes(content)

    monkeypatch.setattr(fetch, "download", download)
    if pinned:
        monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(content).hexdigest())
    return downloads


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_fetches_once_and_only_what_is_needed(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    downloads = serve_archive(monkeypatch, fetch, archive(fetch))
    folder = fetch.source_folder()
    assert files(folder) == {*fetch.REQUIRED, "csrc/cutlass/LICENSE.txt"}
    assert folder.parent == tmp_path / "cache" / "jax_mla_cp" / "fa3"
    assert list(folder.parent.iterdir()) == [folder]
    assert fetch.source_folder() == folder
    assert len(downloads) == 1


def test_another_hash_is_refused_and_nothing_is_kept(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = archive(fetch)
    serve_archive(monkeypatch, fetch, content, pinned=False)
    with pytest.raises(fetch.SourceError) as raised:
        fetch.source_folder()
    message = str(raised.value)
    assert f"expected sha256 {fetch.SHA256}, got {hashlib.sha256(content).hexdigest()}" in message
    assert "FA3_SOURCE_DIR" in message
    assert files(tmp_path / "cache") == set()


def test_an_archive_without_a_needed_file_is_refused(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve_archive(monkeypatch, fetch, archive(fetch, leave_out="hopper/flash.h"))
    with pytest.raises(fetch.SourceError, match=r"lacks hopper/flash\.h"):
        fetch.source_folder()
    assert files(tmp_path / "cache") == set()


def test_no_network_is_one_clear_message(fetch: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert "can't be downloaded: ConnectionError: no route to host." in last
    assert "Fix the network" in last and "FA3_SOURCE_DIR" in last


def test_a_half_done_cache_is_ignored(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_archive(monkeypatch, fetch, archive(fetch))
    folder = fetch.cache_folder()
    partial = folder.parent / ".partial-of-a-killed-process"
    for begun in (folder, partial):
        (begun / "hopper").mkdir(parents=True)
        (begun / "hopper" / "flash.h").write_text("half")
    assert fetch.source_folder() == folder
    assert fetch.missing(folder) == []
    assert (folder / "hopper" / "flash.h").read_text() != "half"


def test_an_interrupted_fetch_leaves_nothing(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(target: Path) -> None:
        target.write_bytes(b"begun")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.source_folder()
    assert files(tmp_path / "cache") == set()


def test_a_cache_that_cannot_be_written_is_named(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(fetch.SourceError, match=r"can't be kept in .*file.*Set XDG_CACHE_HOME"):
        fetch.source_folder()


def test_own_checkout_is_checked_and_taken(tmp_path: Path) -> None:
    """As CMake runs it: the folder alone on stdout, or one line of reason and a status."""

    def run() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "FA3_SOURCE_DIR": str(tmp_path)}
        return subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)

    (tmp_path / "hopper").mkdir()
    for name in ("cuda_check.h", "flash.h", "flash_fwd_launch_template.h", "flash_prepare_scheduler.cu"):
        (tmp_path / "hopper" / name).touch()
    refused = run()
    assert refused.returncode == 1 and refused.stdout == ""
    assert f"FA3_SOURCE_DIR: expected a flash-attention checkout with its submodule csrc/cutlass, got '{tmp_path}'" in (
        refused.stderr
    )
    assert "lacks csrc/cutlass/include/cute/tensor.hpp, csrc/cutlass/include/cutlass/cutlass.h." in refused.stderr

    for name in ("cute/tensor.hpp", "cutlass/cutlass.h"):
        path = tmp_path / "csrc" / "cutlass" / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    taken = run()
    assert taken.returncode == 0, taken.stderr
    assert taken.stdout == f"{tmp_path.resolve()}\n"
