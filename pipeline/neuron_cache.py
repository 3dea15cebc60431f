"""Which neurons of a layer are in memory, and where: slots, and the policy that frees them. Plain NumPy, no model needed.

Axes: F d_ff, S slots, n neurons of a token.

The work for a token grows with the neurons it touches, not with the slots, whatever the policy.

The paper deletes by moving the last rows into the holes, so that the used rows stay contiguous; here the gather takes any rows, so a
freed slot is just filled again and nothing moves. Reference: arXiv:2312.11514, 3.3.
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import InflashError

_HALF_LIFE = 34.0  # tokens; longer ones are as good where text stays what it is, and slower to follow where it does not
_LOOKS = 8  # 16 would keep 1 % more


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a token's neurons are.

    Attributes:
      hit_ids, hit_slots: [h] int32, neurons already in memory and their slots.
      miss_ids, miss_slots: [m] int32, neurons to be read, ids ascending, and the slots given to them.
    """

    hit_ids: np.ndarray
    hit_slots: np.ndarray
    miss_ids: np.ndarray
    miss_slots: np.ndarray


class NeuronCache(Protocol):
    """Slots for one layer's neurons.

    Attributes:
      num_slots: S.
    """

    num_slots: int

    def begin_token(self) -> None:
        """A new token starts: what the policy keeps no longer may be forgotten."""
        ...

    def place(self, neuron_ids: np.ndarray) -> Placement:
        """Gives every neuron a slot. The caller fills those of the misses; other calls leave this call's slots alone.

        Args:
          neuron_ids: [n] int32, ascending, no more than `num_slots`.
        """
        ...

    def resident(self) -> np.ndarray:
        """The neurons in memory, ascending, [at most S] int32."""
        ...


class LeastRecentlyUsed:
    """Keeps whatever fits and evicts what was not used for longest; within one call, in the order of the ids.

    Every touch appends (slot, stamp) to a log; an entry is current while the slot's newest stamp is its own. The oldest current entries
    stand at the log's head, so the head yields the least recently used neurons (or those that left the window) in order, and stale
    entries are dropped in passing.
    """

    def __init__(self, num_neurons: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slot_of = np.full(num_neurons, -1, np.int32)
        self._neuron_in = np.full(num_slots, -1, np.int32)
        self._stamp = np.zeros(num_slots, np.int64)
        self._free = np.arange(num_slots, dtype=np.int32)  # a stack, its top at _num_free - 1
        self._num_free = num_slots
        self._now = 0
        # Four touches of everything fit before stale entries have to be squeezed out.
        self._log = np.empty((4 * num_slots + 64, 2), np.int64)
        self._head = self._tail = 0

    def begin_token(self) -> None:
        pass

    def place(self, neuron_ids: np.ndarray) -> Placement:
        _check_fit(neuron_ids, self.num_slots)
        self._now += 1
        slots = self._slot_of[neuron_ids]
        hit = slots >= 0
        hit_slots = slots[hit]
        self._stamp[hit_slots] = self._now
        miss_ids = neuron_ids[~hit]
        miss_slots = self._take(len(miss_ids))
        self._slot_of[miss_ids] = miss_slots
        self._neuron_in[miss_slots] = miss_ids
        self._stamp[miss_slots] = self._now
        slots[~hit] = miss_slots
        self._append(slots)
        return Placement(neuron_ids[hit], hit_slots, miss_ids, miss_slots)

    def resident(self) -> np.ndarray:
        return np.sort(self._neuron_in[self._neuron_in >= 0])

    def _take(self, count: int) -> np.ndarray:
        """`count` slots nobody uses, evicting the oldest when there are too few free ones."""
        if count > self._num_free:
            self._release(self._oldest(count - self._num_free, before=self._now))
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].copy()

    def _oldest(self, count: int, before: int) -> np.ndarray:
        """Takes up to `count` current slots off the log's head, none touched at `before` or later."""
        taken = [np.empty(0, np.int32)]
        while count and self._head < self._tail:
            entries = self._log[self._head : min(self._head + max(count, 64), self._tail)]
            if entries[0, 1] >= before:
                break
            current = (self._stamp[entries[:, 0]] == entries[:, 1]) & (entries[:, 1] < before)
            ends = np.flatnonzero(current)[:count]
            if len(ends) == count:
                consumed = int(ends[-1]) + 1
            else:  # stop before entries that must stay
                consumed = int(np.searchsorted(entries[:, 1], before))
            taken.append(entries[ends, 0].astype(np.int32))
            count -= len(ends)
            self._head += consumed
        return np.concatenate(taken)

    def _release(self, slots: np.ndarray) -> None:
        self._slot_of[self._neuron_in[slots]] = -1
        self._neuron_in[slots] = -1
        self._stamp[slots] = 0
        self._free[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)

    def _append(self, slots: np.ndarray) -> None:
        if self._tail + len(slots) > len(self._log):
            entries = self._log[self._head : self._tail]
            entries = entries[self._stamp[entries[:, 0]] == entries[:, 1]]
            self._log[: len(entries)] = entries
            self._head, self._tail = 0, len(entries)
        self._log[self._tail : self._tail + len(slots), 0] = slots
        self._log[self._tail : self._tail + len(slots), 1] = self._now
        self._tail += len(slots)


class SlidingWindow(LeastRecentlyUsed):
    """The paper's policy: a token finds the neurons of the `window` tokens before it, and nothing older.

    When a window needs more slots than there are, the oldest tokens' neurons go first.
    """

    def __init__(self, num_neurons: int, num_slots: int, window: int) -> None:
        super().__init__(num_neurons, num_slots)
        self._window = window
        self._starts: deque[int] = deque()  # the newest stamp when each of the last tokens began

    def begin_token(self) -> None:
        self._starts.append(self._now)
        if len(self._starts) > self._window:
            self._release(self._oldest(self.num_slots, before=self._starts.popleft() + 1))


class LeastFrequentlyUsed:
    """Keeps the neurons that are used most, recent uses counting more; they need not have been used lately.

    A few neurons of a trained layer are active for most tokens, and a burst of rare ones must not push them out. Each use adds to a
    neuron's count, and counts halve every `_HALF_LIFE` tokens. Exactly the least used would take a look at all slots, or a heap: instead a
    hand goes round the slots, `_LOOKS` for each that is needed, and the least used of these leave. The work grows with what changes.
    """

    def __init__(self, num_neurons: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slot_of = np.full(num_neurons, -1, np.int32)
        self._neuron_in = np.full(num_slots, -1, np.int32)
        self._count = np.zeros(num_slots, np.float64)
        self._weight = 1.0  # of a use now: growing, where every count would have to shrink
        self._call_of = np.zeros(num_slots, np.int64)  # the last call that used the slot
        self._call = 0
        self._calls_before = 0  # this token
        self._num_used = 0
        self._hand = 0

    def begin_token(self) -> None:
        self._calls_before = self._call
        self._weight *= 2 ** (1 / _HALF_LIFE)
        if self._weight > 1e200:  # once in thousands of tokens
            self._count /= self._weight
            self._weight = 1.0

    def place(self, neuron_ids: np.ndarray) -> Placement:
        _check_fit(neuron_ids, self.num_slots)
        self._call += 1
        slots = self._slot_of[neuron_ids]
        hit = slots >= 0
        hit_slots = slots[hit]
        self._call_of[hit_slots] = self._call
        self._count[hit_slots] += self._weight
        miss_ids = neuron_ids[~hit]
        miss_slots = self._take(len(miss_ids))
        self._slot_of[miss_ids] = miss_slots
        self._neuron_in[miss_slots] = miss_ids
        self._call_of[miss_slots] = self._call
        self._count[miss_slots] = self._weight
        return Placement(neuron_ids[hit], hit_slots, miss_ids, miss_slots)

    def resident(self) -> np.ndarray:
        return np.sort(self._neuron_in[self._neuron_in >= 0])

    def wanted(self, votes: np.ndarray) -> np.ndarray:
        """The neurons not in memory that have most votes, as many as slots were never used: [n] int32, ascending; votes are [F]."""
        absent = np.flatnonzero(self._slot_of < 0)
        count = min(self.num_slots - self._num_used, len(absent))
        return np.sort(absent[np.argsort(-votes[absent], kind="stable")[:count]]).astype(np.int32)

    def fill(self, neuron_ids: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """Slots that were never used, [n] int32, for neurons not in memory; a vote, [n], counts as a use. The caller fills them."""
        slots = self._take(len(neuron_ids))
        self._slot_of[neuron_ids], self._neuron_in[slots] = slots, neuron_ids
        self._count[slots] = self._weight * votes
        return slots

    def num_missing(self, neuron_ids: np.ndarray) -> int:
        """How many of the neurons are not in memory; changes nothing."""
        return int(np.count_nonzero(self._slot_of[neuron_ids] < 0))

    @property
    def full(self) -> bool:
        """Whether no slot was never used."""
        return self._num_used == self.num_slots

    def resize(self, num_slots: int) -> None:
        """Another number of slots, between tokens; the neurons in slots that are no more are forgotten."""
        leaving = self._neuron_in[num_slots:]
        self._slot_of[leaving[leaving >= 0]] = -1
        for name, empty in (("_neuron_in", -1), ("_count", 0), ("_call_of", 0)):
            kept = getattr(self, name)[:num_slots]
            setattr(self, name, np.concatenate((kept, np.full(num_slots - len(kept), empty, kept.dtype))))
        self.num_slots, self._num_used = num_slots, min(self._num_used, num_slots)
        self._hand %= num_slots

    def _take(self, count: int) -> np.ndarray:
        """`count` slots: those never used, then the least used of those that the hand passes."""
        fresh = np.arange(self._num_used, min(self._num_used + count, self.num_slots), dtype=np.int32)
        self._num_used += len(fresh)
        if not (needed := count - len(fresh)):
            return fresh
        leaving = self._pass(needed)
        self._slot_of[self._neuron_in[leaving]] = -1
        return np.concatenate((fresh, leaving)) if len(fresh) else leaving

    def _pass(self, needed: int) -> np.ndarray:
        """Moves the hand over enough slots and returns the `needed` least used.

        None that this call uses, and none that this token's earlier calls used if there are others: those may still be on their way.
        """
        looks, newest = min(_LOOKS * needed, self.num_slots), self._calls_before
        while True:
            passed = np.arange(self._hand, self._hand + looks, dtype=np.int32)
            passed[passed >= self.num_slots] -= self.num_slots
            passed = passed[(self._call_of[passed] <= newest) & (self._neuron_in[passed] >= 0)]
            if len(passed) >= needed:
                break
            if looks == self.num_slots:
                newest = self._call - 1
            looks = min(2 * looks, self.num_slots)  # most of what was passed is in use
        self._hand = (self._hand + looks) % self.num_slots
        return passed[np.argpartition(self._count[passed], needed - 1)[:needed]]


def _check_fit(neuron_ids: np.ndarray, num_slots: int) -> None:
    if len(neuron_ids) > num_slots:
        raise InflashError(f"neuron cache: {len(neuron_ids)} neurons asked for at once, found {num_slots} slots")


def make_cache(num_neurons: int, num_slots: int, policy: str, window: int | None) -> NeuronCache:
    """The cache of one layer under a policy's name ("lfu", "lru", "window" or "none")."""
    if policy == "lfu":
        return LeastFrequentlyUsed(num_neurons, num_slots)
    if policy == "none":
        return SlidingWindow(num_neurons, num_slots, 0)
    if policy == "window":
        assert window is not None
        return SlidingWindow(num_neurons, num_slots, window)
    return LeastRecentlyUsed(num_neurons, num_slots)
