"""The disk as the cost model has it: what loaders ask of it, in the order of `read_schedule`, at known rates."""

from collections import deque
from collections.abc import Sequence


class _Item:
    """What streams by: the time that the disk still needs for it, and when it was there, once that is known."""

    __slots__ = ("done_s", "remaining_s")

    def __init__(self, seconds: float) -> None:
        self.remaining_s = seconds
        self.done_s: float | None = None


class PaperDisk:
    """Serves neurons in the order in which they were asked for, and what streams by where no neurons are asked for.

    Attributes:
      busy_s: time that it has been reading, or will have been.
    """

    def __init__(self, before_neurons_s: float) -> None:
        """Args: before_neurons_s: of a stream's reads that are under way when neurons are asked for."""
        self._before_s, self.busy_s = before_neurons_s, 0.0
        self._at_s = self._neurons_until_s = 0.0  # what it has done is known until then; it has all neurons then
        self._items: deque[_Item] = deque()

    def ask_neurons(self, now_s: float, seconds: float) -> float:
        """When they will be there."""
        self._go_on(now_s)
        begin = max(now_s, self._neurons_until_s)
        if self._neurons_until_s <= now_s:
            begin += self._stream_by(now_s, self._before_s)
        self._neurons_until_s = begin + seconds
        self.busy_s += seconds
        return self._neurons_until_s

    def ask_item(self, now_s: float, seconds: float) -> _Item:
        """The next of what streams by."""
        self._go_on(now_s)
        self._items.append(item := _Item(seconds))
        self.busy_s += seconds
        return item

    def arrival(self, now_s: float, item: _Item) -> float:
        """When an item will be there if no neurons are asked for; now, if it is there."""
        self._go_on(now_s)
        if item.done_s is not None:
            return max(now_s, item.done_s)
        until = max(now_s, self._neurons_until_s)
        for each in self._items:
            until += each.remaining_s
            if each is item:
                break
        return until

    def _go_on(self, now_s: float) -> None:
        idle_from = max(self._at_s, self._neurons_until_s)
        self._stream_by(idle_from, now_s - idle_from)
        self._at_s = max(self._at_s, now_s)

    def _stream_by(self, begin_s: float, seconds: float) -> float:
        """Reads items for so long, or until there are none; returns how long that took."""
        left = seconds = max(seconds, 0.0)
        while left > 0 and self._items:
            spent = min(left, self._items[0].remaining_s)
            self._items[0].remaining_s -= spent
            left -= spent
            if self._items[0].remaining_s <= 0:
                self._items.popleft().done_s = begin_s + seconds - left
        return seconds - left


class PaperStream:
    """`BlockStream` on paper: items of known length in a cycle, some buffers ahead."""

    def __init__(self, disk: PaperDisk, seconds: Sequence[float], num_buffers: int) -> None:
        self._disk, self._seconds, self._next = disk, seconds, 0
        self._ahead: deque[_Item] = deque()
        for _ in range(num_buffers):
            self.ask(0.0)

    def ask(self, now_s: float) -> None:
        """A buffer is free for the next item."""
        self._ahead.append(self._disk.ask_item(now_s, self._seconds[self._next]))
        self._next = (self._next + 1) % len(self._seconds)

    def take(self, now_s: float) -> float:
        """When the next item is there."""
        return self._disk.arrival(now_s, self._ahead.popleft())
