"""The pages of one dp group: who refers to them, what they hold, and which go first when room is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class Pages:
    """Pages are free, in use by one or more requests, or cached: in use by nobody, but what they hold has a name.

    What is in a page has a name (jax_mla_cp/engine/prefix.py) once all of it is computed. A named page is never written to
    again, so any number of requests may read it. Cached pages are taken when no free one is left, the longest unused first.

    A request refers to all pages before one that it refers to, and gives its last ones back first: so a page is always
    evicted before the one that it follows, and no page stays cached that nobody can reach.
    """

    def __init__(self, count: int, page_size: int):
        self.count = count
        self.page_size = page_size
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count
        self._page: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    @property
    def free(self) -> int:
        """Pages that hold nothing that could be reused."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that nobody uses, but whose content may be reused."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that can be allocated."""
        return len(self._free) + len(self._cached)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, pages: int) -> list[int]:
        """Takes so many pages for one request.

        Raises:
          ValueError: there are fewer.
        """
        if pages > self.available:
            raise ValueError(f"{pages} pages asked for, {self.available} of {self.count} are available.")
        while len(self._free) < pages:
            self._evict()
        taken = [self._free.pop() for _ in range(pages)]
        for page in taken:
            self._references[page] = 1
        return taken

    def find(self, name: bytes) -> int | None:
        """The page with this content."""
        return self._page.get(name)

    def unused(self, pages: Iterable[int]) -> int:
        """How many of these pages are cached: `share` makes so many fewer available."""
        return sum(not self._references[page] for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """One more request refers to these named pages."""
        for page in pages:
            if not self._references[page]:
                del self._cached[page]
            self._references[page] += 1

    def register(self, name: bytes, page: int) -> int:
        """Names what a request has computed into its page.

        Returns:
          The page that the request refers to from now on: if another one has the same content, that one, and its own is
          free again.
        """
        same = self._page.setdefault(name, page)
        if same == page:
            self._name[page] = name
        else:
            self.share([same])
            self.release([page])
        return same

    def release(self, pages: Iterable[int]) -> None:
        """A request, with its pages in order, refers to them no longer.

        Raises:
          ValueError: a page that is not in use.
        """
        for page in reversed(list(pages)):
            if not self._references[page]:
                raise ValueError(f"page {page} is not in use.")
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._name:
                self._cached[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """Names nothing any more: the memory behind the pages is lost."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._page.clear()
        self._name.clear()

    def _evict(self) -> None:
        page, _ = self._cached.popitem(last=False)
        del self._page[self._name.pop(page)]
        self._free.append(page)
