"""Which pages are free, per dp group."""

from __future__ import annotations


class Pages:
    """The free pages of one dp group. A page has one owner until it is freed."""

    def __init__(self, count: int, page_size: int):
        self.count = count
        self.page_size = page_size
        self._free = list(range(count - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.page_size)

    def can_allocate(self, pages: int) -> bool:
        return pages <= len(self._free)

    def allocate(self, pages: int) -> list[int]:
        """Takes so many pages.

        Raises:
          ValueError: there are fewer.
        """
        if not self.can_allocate(pages):
            raise ValueError(f"{pages} pages asked for, {len(self._free)} of {self.count} are free.")
        taken = [self._free.pop() for _ in range(pages)]
        self._used.update(taken)
        return taken

    def release(self, pages: list[int]) -> None:
        """Gives pages back.

        Raises:
          ValueError: a page that is not in use.
        """
        if not self._used.issuperset(pages) or len(set(pages)) != len(pages):
            raise ValueError(f"pages {sorted(set(pages) - self._used)} are not in use.")
        self._used.difference_update(pages)
        self._free.extend(pages)
