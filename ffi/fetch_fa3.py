"""Fetches FlashAttention-3's source for the CUDA build. Prints its folder on stdout, progress and errors on stderr.

The source is the flash-attention tree under third_party/ of a source distribution on PyPI, which is pinned by its hash,
downloaded once and unpacked into the user's cache. FA3_SOURCE_DIR names a flash-attention checkout to use instead.
cmake/DetectCUDA.cmake runs this file; it is not part of the installed package.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PROJECT = "xformers"
ARCHIVE = "xformers-0.0.33.post2.tar.gz"  # flash-attention v2.8.3-133-gde1584b
SHA256 = "647ddf26578d2b8643230467ef1f0fbfef0bbe556a546bd27a70d4855d3433e1"
TREE = PurePosixPath("xformers-0.0.33.post2/third_party/flash-attention")
TIMEOUT = 60.0  # seconds without an answer, not for the whole download

# The parts of TREE that are unpacked. FA3's instantiations are hundreds of files that this build doesn't compile.
INCLUDED = ("hopper", "csrc/cutlass/include", "csrc/cutlass/LICENSE.txt")
EXCLUDED = ("hopper/instantiations",)
# The files that a source folder must have.
REQUIRED = (
    "hopper/cuda_check.h",
    "hopper/flash.h",
    "hopper/flash_fwd_launch_template.h",
    "hopper/flash_prepare_scheduler.cu",
    "csrc/cutlass/include/cute/tensor.hpp",
    "csrc/cutlass/include/cutlass/cutlass.h",
)
REMEDY = (
    "Fix the network (the proxy settings of the environment are used), or set FA3_SOURCE_DIR to a flash-attention "
    "checkout with its submodule csrc/cutlass."
)


class SourceError(Exception):
    """The source is not available. The message says what was expected, what was found, and what to do."""


def missing(folder: Path) -> list[str]:
    """Returns the required files that `folder` lacks."""
    return [name for name in REQUIRED if not (folder / name).is_file()]


def cache_folder() -> Path:
    """Returns the folder of the unpacked source in the user's cache. Each pinned archive has its own."""
    # The XDG specification says to ignore a relative path.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path.home() / ".cache"
    return base / "jax_mla_cp" / "fa3" / SHA256[:16]


def download(target: Path) -> None:
    """Downloads the archive to `target`, unverified."""
    # Imported here: not needed, and perhaps not installed, where the source is cached or the user's own.
    from pypi_simple import PyPISimple

    with PyPISimple() as index:
        page = index.get_project_page(PROJECT, timeout=TIMEOUT)
        found = [package for package in page.packages if package.filename == ARCHIVE]
        if not found:
            raise SourceError(
                f"The package index has {len(page.packages)} files of {PROJECT}, none is {ARCHIVE}. {REMEDY}"
            )
        # `verify` checks our own hash instead of the index's.
        index.download_package(found[0], target, verify=False, timeout=TIMEOUT)


def verify(archive: Path) -> None:
    """Raises SourceError unless `archive` has the pinned hash."""
    with archive.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != SHA256:
        raise SourceError(
            f"{ARCHIVE} is not the expected file and was not used: expected sha256 {SHA256}, got {got}. {REMEDY}"
        )


def unpack(archive: Path, target: Path) -> None:
    """Extracts the included files of `archive` into `target`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            # Only regular files inside TREE: also safe on Pythons without tarfile's own filters (3.11.0-3).
            if not member.isfile() or ".." in path.parts or not path.is_relative_to(TREE):
                continue
            inner = path.relative_to(TREE)
            if not any(inner.is_relative_to(name) for name in INCLUDED):
                continue
            if any(inner.is_relative_to(name) for name in EXCLUDED):
                continue
            source = tar.extractfile(member)
            assert source is not None  # it is a regular file
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            with source, (target / inner).open("wb") as file:
                shutil.copyfileobj(source, file)


def fetch(folder: Path) -> None:
    """Downloads and unpacks the source into `folder`, atomically: no process ever sees it incomplete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as name:
        archive, tree = Path(name) / ARCHIVE, Path(name) / "tree"
        print(f"jax_mla_cp: downloading FlashAttention-3's source ({ARCHIVE}, 15 MB)", file=sys.stderr, flush=True)
        try:
            download(archive)
        except SourceError:
            raise
        except Exception as error:  # any error of the client, the network or a proxy
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise  # not a network error: source_folder reports it
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise SourceError(
                f"FlashAttention-3's source ({ARCHIVE}) can't be downloaded: {reason}. {REMEDY}"
            ) from error
        verify(archive)
        unpack(archive, tree)
        if lacking := missing(tree):
            raise SourceError(f"{ARCHIVE} lacks {', '.join(lacking)} under {TREE}. {REMEDY}")
        if not missing(folder):  # another process was faster, and its compilers may be reading the files
            return
        if folder.exists():  # damaged
            folder.rename(Path(name) / "old")
        tree.rename(folder)
    print(f"jax_mla_cp: unpacked FlashAttention-3's source into {folder}", file=sys.stderr, flush=True)


def source_folder() -> Path:
    """Returns the folder with hopper/ and csrc/cutlass/include/. Fetches it if necessary.

    Raises:
      SourceError: the source is not available.
    """
    if checkout := os.environ.get("FA3_SOURCE_DIR"):
        if lacking := missing(Path(checkout)):
            raise SourceError(
                f"FA3_SOURCE_DIR: expected a flash-attention checkout with its submodule csrc/cutlass, got {checkout!r}, which "
                f"lacks {', '.join(lacking)}. Correct it, or unset it to have the source downloaded."
            )
        return Path(checkout).resolve()
    folder = cache_folder()
    if missing(folder):
        try:
            fetch(folder)
        except OSError as error:
            raise SourceError(
                f"FlashAttention-3's source can't be kept in {folder}: {error}. Set XDG_CACHE_HOME to a folder that can be "
                "written, or FA3_SOURCE_DIR to a flash-attention checkout."
            ) from error
    return folder


def main() -> int:
    try:
        print(source_folder())
    except SourceError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
