"""The KV cache pages of one dp group: free list, refcounts, prefix hashes, LRU eviction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PagePool:
    """Allocates pages to requests and keeps committed pages for reuse. Page ids are 0 to `num_pages` - 1.

    A page is in one of three states:

    - free: it holds nothing that can be reused;
    - in use: its refcount is the number of requests that have it in their page list;
    - cached: its refcount is 0, but it is committed and can still be found by its prefix hash.

    A page is committed under its prefix hash (jax_mla_cp/engine/prefix_hash.py) once all of its tokens are computed. It is
    never written to again, so any number of requests may read it. When no page is free, cached pages are evicted, the least
    recently used first.

    A request references every page of its prefix and releases the last page first. A page is therefore evicted before
    the page it follows, and no cached page is unreachable.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._refcount = [0] * num_pages
        self._page_by_hash: dict[bytes, int] = {}
        self._hash_by_page: dict[int, bytes] = {}
        self._lru: OrderedDict[int, None] = OrderedDict()  # cached pages, the least recently used first

    @property
    def num_free(self) -> int:
        """Pages that hold nothing reusable."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Committed pages with refcount 0."""
        return len(self._lru)

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free ones, and cached ones, which are evicted."""
        return len(self._free) + len(self._lru)

    def pages_for(self, num_tokens: int) -> int:
        """Number of pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages for one request, each with refcount 1. Evicts cached pages if there are too few free ones.

        Raises:
          ValueError: fewer than `num_pages` are available.
        """
        if num_pages > self.num_available:
            raise ValueError(f"{num_pages} pages requested, {self.num_available} of {self.num_pages} are available.")
        while len(self._free) < num_pages:
            self._evict()
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._refcount[page] = 1
        return pages

    def lookup(self, prefix_hash: bytes) -> int | None:
        """The page committed under this hash."""
        return self._page_by_hash.get(prefix_hash)

    def count_cached(self, pages: Iterable[int]) -> int:
        """Number of these committed pages that have refcount 0. `share` makes them unavailable."""
        return sum(not self._refcount[page] for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Increments the refcount of committed pages: one more request reads them."""
        for page in pages:
            if not self._refcount[page]:
                del self._lru[page]
            self._refcount[page] += 1

    def commit(self, page: int, prefix_hash: bytes) -> int:
        """Makes a computed page available to other requests under its prefix hash.

        Returns:
          The page that the request must use from now on. If another page already has this hash, that page is shared and
          `page` is released.
        """
        committed = self._page_by_hash.setdefault(prefix_hash, page)
        if committed == page:
            self._hash_by_page[page] = prefix_hash
        else:
            self.share([committed])
            self.release([page])
        return committed

    def release(self, pages: Iterable[int]) -> None:
        """Decrements the refcount of a request's pages, given in its order. At 0, a page becomes cached or free.

        Raises:
          ValueError: a page is not in use.
        """
        for page in reversed(list(pages)):
            if not self._refcount[page]:
                raise ValueError(f"page {page} is not in use.")
            self._refcount[page] -= 1
            if self._refcount[page]:
                continue
            if page in self._hash_by_page:
                self._lru[page] = None
            else:
                self._free.append(page)

    def reset_prefix_cache(self) -> None:
        """Forgets all prefix hashes: the content of the pages is lost."""
        self._free.extend(self._lru)
        self._lru.clear()
        self._page_by_hash.clear()
        self._hash_by_page.clear()

    def _evict(self) -> None:
        page, _ = self._lru.popitem(last=False)
        del self._page_by_hash[self._hash_by_page.pop(page)]
        self._free.append(page)
