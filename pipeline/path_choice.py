"""Which way a cached layer's neurons come while many sequences decode: the predicted ones by slot, or all of them in order.

Sequences share what is read, so a step reads the union of what they need. The union of many is nearly all neurons, and then it is cheaper
to read them in order, at the disk's best rate. Which way is cheaper follows from how many neurons steps name and miss, layer by layer, and
from what a row costs each way. Both are measured while the engine runs. Plain Python, no model needed.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_TIMED_EVERY = 4  # steps; timing one waits for its kernels
_NEWEST = 0.25  # weight of what the newest step named
_KEPT = 5  # measurements of a rate; their median counts, as a single step may be held up by anything
_MARGIN = 0.93  # the other way has to be so much cheaper
_TRIAL_SHARE = 0.01  # of all time may go into trying the dearer way
_FEWEST_BETWEEN = 24  # steps from one trial to the next


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRates:
    """Seconds of a neuron, for as many sequences as decode together, before anything was measured.

    Attributes:
      gathered_s: computed from its slot, if all sequences name it.
      missed_s: read by itself, beyond computing it.
      streamed_s: read in order and computed.
    """

    gathered_s: float
    missed_s: float
    streamed_s: float


@dataclass(slots=True)
class _Seen:
    """What a layer's steps lately named, and of that read; None: nothing is known yet."""

    named: float | None = None
    missed: float = 0.0

    def add(self, named: int, missed: int) -> None:
        weight = 1.0 if self.named is None else _NEWEST
        self.named = (self.named or 0.0) + weight * (named - (self.named or 0.0))
        self.missed += weight * (missed - self.missed)


@dataclass(slots=True)
class _Measured:
    """What the layers of a step took together, and what earlier steps said of a rate; `rate` is as assumed until there is one."""

    rate: float
    seconds: float = 0.0
    amount: float = 0.0
    _newest: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, seconds: float, amount: float) -> None:
        self.seconds += seconds
        self.amount += amount

    def end_step(self) -> None:
        """The step's sums become a measurement, and start anew."""
        if self.amount:
            self._newest.append(self.seconds / self.amount)
            self.rate = statistics.median(self._newest)
        self.seconds = self.amount = 0.0


@dataclass(slots=True)
class PathChoice:
    """Decides for every cached layer, between steps.

    Attributes:
      layers: that are cached.
      d_ff: neurons of each.
      rates: as assumed.
      dense: layers that this step streams.
      timed: whether this step is to be measured.
      on_trial: whether this step goes the dearer way, to see what that costs now.
    """

    layers: Sequence[int]
    d_ff: int
    rates: RowRates
    dense: frozenset[int] = frozenset()
    timed: bool = True
    on_trial: bool = False
    _settled: frozenset[int] = frozenset()
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _full: set[int] = field(default_factory=set)
    _sparse: _Measured = field(init=False)  # times as long as the rates say that steps by slot take
    _streamed: _Measured = field(init=False)  # seconds of a neuron in order
    _steps: int = 0
    _since_trial: int = 0
    _credit_s: float = 0.0

    def __post_init__(self) -> None:
        self._seen = {layer: _Seen() for layer in self.layers}
        self._sparse, self._streamed = _Measured(1.0), _Measured(self.rates.streamed_s)

    def saw(self, layer: int, named: int, missed: int, *, full: bool) -> None:
        """What a step named in a layer, and of that had to be read, or would have had to be; `full`: the cache has no free slot left."""
        self._seen[layer].add(named, missed)
        if full:
            self._full.add(layer)

    def took_sparse(self, named: int, missed: int, seconds: float) -> None:
        """A layer's time by slot, when so many neurons were named and read."""
        self._sparse.add(seconds, self._assumed_s(named, missed))

    def took_dense(self, seconds: float) -> None:
        """A layer's time in order."""
        self._streamed.add(seconds, self.d_ff)

    def expected_s(self, layer: int) -> tuple[float, float]:
        """Seconds by slot and in order."""
        seen = self._seen[layer]
        return self._sparse.rate * self._assumed_s(seen.named or 0.0, seen.missed), self.d_ff * self._streamed.rate

    def _assumed_s(self, named: float, missed: float) -> float:
        return named * self.rates.gathered_s + missed * self.rates.missed_s

    def next_step(self) -> None:
        """Called after each step: decides how the next one goes."""
        self._sparse.end_step()
        self._streamed.end_step()
        self._steps += 1
        self._since_trial += 1
        if self.on_trial:
            self._since_trial, self.on_trial = 0, False
        self._settled = frozenset(layer for layer in self.layers if self._is_dense(layer))
        expected = [self.expected_s(layer) for layer in self.layers]
        self._credit_s += _TRIAL_SHARE * sum(min(both) for both in expected)
        extra_s = sum(max(both) - min(both) for both in expected)
        self.on_trial = len(self._full) == len(self.layers) and self._since_trial >= _FEWEST_BETWEEN and self._credit_s >= extra_s
        if self.on_trial:
            self._credit_s = 0.0
        self.dense = frozenset(self.layers) - self._settled if self.on_trial else self._settled
        self.timed = self.on_trial or self._steps % _TIMED_EVERY == 0 or self._steps < _TIMED_EVERY

    def _is_dense(self, layer: int) -> bool:
        """An empty cache misses everything and says nothing: it is filled first."""
        if layer not in self._full:
            return False
        sparse_s, dense_s = self.expected_s(layer)
        return dense_s < sparse_s / _MARGIN if layer in self._settled else dense_s < _MARGIN * sparse_s
