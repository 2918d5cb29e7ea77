"""Prefix hashes of pages: a keyed hash of a page's tokens and of all tokens before them.

A latent depends on its token and on every token before it. A page's hash therefore covers the hash of the page before it and
the page's own tokens. With the MTP layer, the latent in the page's last slot also depends on the next token. The hash then
covers that token too, and the page has no hash until the token is known.

The key is random and never leaves the process: nobody can construct two texts whose pages collide, or predict a hash. A
request's `cache_salt` starts the chain, so requests with different salts share no pages, and time to first token tells
nobody what another request contained.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array

from jax_mla_cp.engine.request import Request

_BYTES = 16


class PrefixHasher:
    """Computes the prefix hashes of requests' pages. All dp groups share one hasher.

    Args:
      covers_next: a page's latents depend on the token after it (MTP).
    """

    def __init__(self, page_size: int, *, covers_next: bool):
        self._page_size = page_size
        self._lookahead = int(covers_next)
        self._key = secrets.token_bytes(32)

    def num_hashable(self, num_tokens: int) -> int:
        """Number of pages of a request with `num_tokens` known tokens that have a hash."""
        return (num_tokens - self._lookahead) // self._page_size

    def page_hash(self, request: Request, page: int) -> bytes | None:
        """The hash of a request's page, counted from 0; None if too few of its tokens are known.

        Hashes are kept in `request.page_hashes`, so that each page is hashed once.
        """
        if page >= self.num_hashable(request.num_known_tokens):
            return None
        hashes = request.page_hashes
        while len(hashes) <= page:
            before = hashes[-1] if hashes else self._hash(b"salt", request.cache_salt.encode())
            first = len(hashes) * self._page_size
            tokens = request.tokens[first : first + self._page_size + self._lookahead]
            hashes.append(self._hash(b"page", before + array("i", tokens).tobytes()))
        return hashes[page]

    def _hash(self, kind: bytes, content: bytes) -> bytes:
        """`kind` separates the hash of a salt from that of a page."""
        return hashlib.blake2b(content, digest_size=_BYTES, key=self._key, person=kind).digest()
