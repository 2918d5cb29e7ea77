"""The names of pages: what a page holds, and all before it, as a keyed hash.

A latent depends on its token and on all tokens before it, so a page's name covers the name of the page before, and its own
tokens. With the MTP layer, its latent in the page's last slot depends on the token after that too: then the name covers this
token, and the page has none until it is known.

The key is random and never leaves the process. Without it nobody can make two texts whose pages have the same name, or know
a name beforehand. A request's `cache_salt` is mixed into the first name: requests with different salts share no page, so
that none can tell from its time to the first token what another one had asked.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_mla_cp.engine.request import Request

_BYTES = 16


class Names:
    """Gives the pages of requests their names. All dp groups share one.

    Args:
      covers_next: the latents of a page depend on the token after it.
    """

    def __init__(self, page_size: int, *, covers_next: bool):
        self._page_size = page_size
        self._ahead = int(covers_next)
        self._key = secrets.token_bytes(32)

    def known(self, tokens: int) -> int:
        """How many pages of a request with so many tokens have names."""
        return (tokens - self._ahead) // self._page_size

    def of(self, request: Request, page: int) -> bytes | None:
        """The name of a request's page, counted from 0; None if too few of its tokens are known.

        What has been hashed is kept in `request.names`, so that every page is hashed once.
        """
        if page >= self.known(len(request.tokens)):
            return None
        names = request.names
        while len(names) <= page:
            before = names[-1] if names else self._hash(b"salt", request.cache_salt.encode())
            first = len(names) * self._page_size
            tokens = request.tokens[first : first + self._page_size + self._ahead]
            names.append(self._hash(b"page", before + array("i", tokens).tobytes()))
        return names[page]

    def _hash(self, kind: bytes, content: bytes) -> bytes:
        """`kind` keeps a salt from being taken for a page."""
        return hashlib.blake2b(content, digest_size=_BYTES, key=self._key, person=kind).digest()
