"""The training text: free documentation from Debian packages, unpacked without being installed.

A document is (source, name, text). Some of the Python and Perl documents are held out from training;
`python -m jax_mla_cp.eval` hides its passkeys in them.
"""

from __future__ import annotations

import html.parser
import json
import lzma
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = {
    "python3.11-doc": "PSF-2.0",
    "perl-doc": "Artistic or GPL-1+",
    "docutils-doc": "public domain, BSD-2-Clause",
    "postgresql-doc-15": "PostgreSQL",
    "python-aiohttp-doc": "Apache-2.0",
    "python-attr-doc": "MIT",
    "python-cryptography-doc": "Apache-2.0 or BSD-3-Clause",
    "python-django-doc": "BSD-3-Clause",
    "python-flask-doc": "BSD-3-Clause",
    "python-jinja2-doc": "BSD-3-Clause",
    "python-pandas-doc": "BSD-3-Clause",
    "python-pil-doc": "HPND",
    "python-psycopg2-doc": "LGPL-3+",
    "python-requests-doc": "Apache-2.0",
    "python-setuptools-doc": "MIT",
    "python-sqlalchemy-doc": "MIT",
    "python-tornado-doc": "Apache-2.0",
    "python-werkzeug-doc": "BSD-3-Clause",
    "sphinx-doc": "BSD-2-Clause",
}
"""Debian package -> license of its text. Debian 12's versions were used."""

_HELD_OUT_FROM = ("python3.11-doc", "perl-doc")
_HELD_OUT_ONE_IN = 40
_PLAIN_SUFFIXES = (".rst.txt", ".pod", ".rst")
_MIN_LETTERS = 0.55  # fraction of the characters; below it are tables of characters and the like
_MAX_DOCUMENT_CHARS = 400_000  # Perl's change logs are longer


class Document(NamedTuple):
    source: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return self.source in _HELD_OUT_FROM and zlib.crc32(self.name.encode()) % _HELD_OUT_ONE_IN == 0


def collect() -> list[Document]:
    """Downloads the packages with apt-get and reads their documents."""
    documents: list[Document] = []
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True)
            (archive,) = Path(folder).glob(f"{package}_*.deb")
            root = Path(folder) / package
            subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
            documents += _read(package, root)
    return documents


def save(documents: list[Document], path: Path) -> None:
    with lzma.open(path, "wt", encoding="utf-8", preset=6) as file:
        for document in documents:
            file.write(json.dumps(document) + "\n")


def load(path: Path) -> list[Document]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [Document(*json.loads(line)) for line in file]


def _read(package: str, root: Path) -> Iterator[Document]:
    """Reads a package's plain-text sources or, if it has none, its HTML."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    plain = [path for path in files if path.name.endswith(_PLAIN_SUFFIXES)]
    seen: set[str] = set()
    for path in plain or [path for path in files if path.suffix == ".html"]:
        text = path.read_text(encoding="utf-8", errors="ignore")
        text = _normalize(text if plain else _from_html(text))
        if text in seen or not 500 <= len(text) <= _MAX_DOCUMENT_CHARS:
            continue
        if sum(c.isascii() and c.isalpha() for c in text) < _MIN_LETTERS * len(text):
            continue
        seen.add(text)
        yield Document(package, str(path.relative_to(root)), text)


def _normalize(text: str) -> str:
    """Removes trailing spaces and repeated empty lines."""
    lines: list[str] = []
    for line in text.replace("\t", "        ").splitlines():
        line = line.rstrip()
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip() + "\n"


class _Text(html.parser.HTMLParser):
    _SKIPPED = ("script", "style", "head", "nav", "footer")
    _BLOCKS = ("p", "div", "h1", "h2", "h3", "h4", "li", "dt", "dd", "tr", "pre", "br", "table", "section")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping = 0
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipping += tag in self._SKIPPED
        self._verbatim += tag == "pre"
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in self._SKIPPED
        self._verbatim -= tag == "pre"
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data if self._verbatim else " ".join(data.split("\n")))


def _from_html(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    return "".join(parser.parts)
