"""Which way cached layers' neurons come while many sequences decode: the predicted ones by slot, or all of them in order.

Sequences share what is read, so a step reads the union of what they need. The union of many is nearly all neurons, and then it is cheaper
to read them in order, at the disk's best rate. A step goes one of three ways: every layer by slot, every layer in order, or each layer the
way that is cheaper for it. What a row costs is measured in steps that go one way only: where both are mixed, what is read ahead for a layer
in order can delay its neighbours, so that it looks cheap and they look dear. What mixing costs is therefore measured for itself, by whole
steps. Plain Python, no model needed.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

_TIMED_EVERY = 4  # steps; timing one waits for its kernels
_NEWEST = 0.25  # weight of what the newest step named
_KEPT = 5  # measurements of a rate; their median counts, as a single step may be held up by anything
_MARGIN = 0.93  # another way has to be so much cheaper
_TRIAL_SHARE = 0.01  # of all time may go into trying dearer ways
_FEWEST_BETWEEN = 24  # steps from one trial to the next


class Way(Enum):
    """How a step's layers go."""

    BY_SLOT = "by slot"
    IN_ORDER = "in order"
    MIXED = "each the cheaper way"


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
    """What timed steps say of a rate: their median; `rate` is as assumed until there is one."""

    rate: float
    _newest: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, rate: float) -> None:
        self._newest.append(rate)
        self.rate = statistics.median(self._newest)


@dataclass(slots=True)
class _Step:
    """What a timed step's layers took so far, and what the rates assumed for those by slot."""

    sparse_s: float = 0.0
    assumed_s: float = 0.0
    dense_s: float = 0.0
    dense_neurons: int = 0


@dataclass(slots=True)
class PathChoice:
    """Decides for every cached layer, between steps.

    Attributes:
      layers: that are cached.
      d_ff: neurons of each.
      rates: as assumed.
      dense: layers that this step streams.
      timed: whether this step is to be measured.
      on_trial: whether this step goes a dearer way, to see what that costs now.
    """

    layers: Sequence[int]
    d_ff: int
    rates: RowRates
    dense: frozenset[int] = frozenset()
    timed: bool = True
    on_trial: bool = False
    _way: Way = Way.BY_SLOT  # settled on, for steps that are no trial
    _cheaper: frozenset[int] = frozenset()  # in order than by slot
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _full: set[int] = field(default_factory=set)
    _step: _Step = field(default_factory=_Step)
    _sparse: _Measured = field(init=False)  # times as long as the rates say that layers by slot take
    _streamed: _Measured = field(init=False)  # seconds of a neuron in order
    _mixing: _Measured = field(init=False)  # times as long as the same layers take in steps that go one way
    _steps: int = 0
    _gone: dict[Way, int] = field(default_factory=dict)  # when a step last went each way
    _since_trial: int = 0
    _credit_s: float = 0.0

    def __post_init__(self) -> None:
        self._seen = {layer: _Seen() for layer in self.layers}
        self._sparse, self._streamed, self._mixing = _Measured(1.0), _Measured(self.rates.streamed_s), _Measured(1.0)
        self._gone = dict.fromkeys(Way, 0)

    def saw(self, layer: int, named: int, missed: int, *, full: bool) -> None:
        """What a step named in a layer, and of that had to be read, or would have had to be; `full`: the cache has no free slot left."""
        self._seen[layer].add(named, missed)
        if full:
            self._full.add(layer)

    def took_sparse(self, named: int, missed: int, seconds: float) -> None:
        """A layer's time by slot, when so many neurons were named and read."""
        self._step.sparse_s += seconds
        self._step.assumed_s += self._assumed_s(named, missed)

    def took_dense(self, seconds: float) -> None:
        """A layer's time in order."""
        self._step.dense_s += seconds
        self._step.dense_neurons += self.d_ff

    def expected_s(self, layer: int) -> tuple[float, float]:
        """Seconds by slot and in order, in steps that go one way."""
        seen = self._seen[layer]
        return self._sparse.rate * self._assumed_s(seen.named or 0.0, seen.missed), self.d_ff * self._streamed.rate

    def expected_step_s(self) -> dict[Way, float]:
        """Seconds of all cached layers, each way that differs from the others."""
        both = {layer: self.expected_s(layer) for layer in self.layers}
        seconds = {way: sum(both[layer][layer in self._dense_of(way)] for layer in self.layers) for way in Way}
        seconds[Way.MIXED] *= self._mixing.rate
        return {way: seconds[way] for way in Way if way == self._kind(self._dense_of(way))}

    def _assumed_s(self, named: float, missed: float) -> float:
        return named * self.rates.gathered_s + missed * self.rates.missed_s

    def _dense_of(self, way: Way) -> frozenset[int]:
        """An empty cache misses everything and says nothing: it is filled first, so all layers means those whose cache is full."""
        return {Way.BY_SLOT: frozenset(), Way.IN_ORDER: frozenset(self._full), Way.MIXED: self._cheaper}[way]

    def _kind(self, dense: frozenset[int]) -> Way:
        """The way that a step with these layers in order goes."""
        if not dense:
            return Way.BY_SLOT
        return Way.IN_ORDER if dense == self._full else Way.MIXED

    def next_step(self) -> None:
        """Called after each step: decides how the next one goes."""
        self._end_step()
        self._cheaper = frozenset(layer for layer in self.layers if self._is_cheaper(layer))
        expected = self.expected_step_s()
        before, self._way = self._way, self._settle(expected)
        self._credit_s += _TRIAL_SHARE * min(expected.values())
        tried = self._to_try(expected)
        self.on_trial = tried is not None
        self.dense = self._dense_of(tried or self._way)
        self.timed = self.on_trial or self._way != before or self._steps % _TIMED_EVERY == 0 or self._steps < _TIMED_EVERY

    def _end_step(self) -> None:
        """What the step took becomes a measurement of the way that it went."""
        step, way = self._step, self._kind(self.dense)
        if way == Way.BY_SLOT and step.assumed_s:
            self._sparse.add(step.sparse_s / step.assumed_s)
        elif way == Way.IN_ORDER and step.dense_neurons:
            self._streamed.add(step.dense_s / step.dense_neurons)
        elif way == Way.MIXED and step.assumed_s and step.dense_neurons:
            apart_s = self._sparse.rate * step.assumed_s + self._streamed.rate * step.dense_neurons
            self._mixing.add((step.sparse_s + step.dense_s) / apart_s)
        self._step = _Step()
        self._steps += 1
        self._gone[way] = self._steps
        self._since_trial = 0 if self.on_trial else self._since_trial + 1

    def _is_cheaper(self, layer: int) -> bool:
        """In order than by slot; a layer changes sides only where it clearly pays, as a stream's reading ahead is lost then."""
        if layer not in self._full:
            return False
        sparse_s, dense_s = self.expected_s(layer)
        return dense_s < sparse_s / _MARGIN if layer in self._cheaper else dense_s < _MARGIN * sparse_s

    def _settle(self, expected: dict[Way, float]) -> Way:
        """The cheapest way, and the one that steps go already unless another is clearly cheaper."""
        now = self._way if self._way in expected else self._kind(self._dense_of(self._way))
        cheapest = min(expected, key=expected.__getitem__)
        return cheapest if expected[cheapest] < _MARGIN * expected[now] else now

    def _to_try(self, expected: dict[Way, float]) -> Way | None:
        """A way that nothing is known of lately, once trying it costs little against what steps have taken since the last trial."""
        others = [way for way in expected if way != self._way]
        if len(self._full) < len(self.layers) or self._since_trial < _FEWEST_BETWEEN or not others:
            return None
        tried = min(others, key=self._gone.__getitem__)
        if self._credit_s < expected[tried] - expected[self._way]:
            return None
        self._credit_s = 0.0
        return tried
