"""Weights that pass through memory in order: blocks read ahead into a few buffers while the one before is used.

The feed-forward sum runs over neurons, so a block of neurons at a time is all the memory that a layer of any size needs.
"""

from collections import deque
from collections.abc import Callable, Sequence

import jax

from ..errors import RunError
from .loader_pool import LoaderPool, Ticket


class BlockStream:
    """Numbered items, taken in a known order, each in one of a few buffers.

    Use: `buffer = stream.take(item)`, dispatch what reads it, `stream.give_back(buffer, result)`; the buffer is filled again once
    `result` is computed.
    """

    def __init__(
        self,
        pool: LoaderPool,
        load: Callable[[int, int], list[Ticket]],
        *,
        items: Sequence[int],
        num_buffers: int,
        cyclic: bool,
    ) -> None:
        """Reads nothing yet.

        Args:
          pool: the loaders.
          load: asks for item i into buffer b.
          items: the order in which they are taken.
          num_buffers: at least 2; one less than this is read ahead.
          cyclic: after the last item the first is read ahead, as when every token streams the whole model.
        """
        self._pool, self._load = pool, load
        self._ahead: deque[tuple[int, int, list[Ticket]]] = deque()
        self._free: deque[tuple[int, jax.Array | None]] = deque((buffer, None) for buffer in range(num_buffers))
        self._order(items, cyclic=cyclic)

    def follow(self, items: Sequence[int], *, cyclic: bool) -> None:
        """From now on items are taken in another order."""
        self._cyclic = cyclic
        if items is not self._items:
            self._drop()
            self._order(items, cyclic=cyclic)

    def _order(self, items: Sequence[int], *, cyclic: bool) -> None:
        self._items, self._cyclic, self._next = items, cyclic, 0
        self._places = {item: place for place, item in enumerate(items)}

    def take(self, item: int) -> int:
        """The buffer that holds `item`, complete."""
        if not self._ahead or self._ahead[0][0] != item:
            self._restart(item)
        _, buffer, tickets = self._ahead.popleft()
        for ticket in tickets:
            self._pool.wait(ticket)
        return buffer

    def give_back(self, buffer: int, result: jax.Array) -> None:
        """The buffer may be filled again when `result` is computed."""
        self._free.append((buffer, result))
        # A result that is still being computed is left alone; waiting for the ones before it costs nothing.
        self._fill(keep=0 if result.is_ready() else 1)  # pyright: ignore[reportAttributeAccessIssue]

    def _restart(self, item: int) -> None:
        """Begins to read at `item`."""
        self._drop()
        self._next = self._places.get(item, len(self._items))
        self._fill(keep=0)
        if not self._ahead:
            raise RunError(f"block stream: item {item} is out of range, or no buffer was given back")

    def _drop(self) -> None:
        """What was read ahead for another place is forgotten once it has arrived."""
        for _, buffer, tickets in self._ahead:
            for ticket in tickets:
                self._pool.wait(ticket)
            self._free.append((buffer, None))
        self._ahead.clear()

    def _fill(self, keep: int) -> None:
        while len(self._free) > keep and self._next < len(self._items):
            buffer, guard = self._free.popleft()
            if guard is not None:
                guard.block_until_ready()
            item = self._items[self._next]
            self._ahead.append((item, buffer, self._load(item, buffer)))
            self._next += 1
            if self._cyclic and self._next == len(self._items):
                self._next = 0
