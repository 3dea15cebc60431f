"""A process's own spans: what it did, when, for which layer; or nothing at all, at no cost, when nobody asked.

A process has one recorder, as it has one log: `recorder()` is `OFF` unless `attach` was called before the engine was made. Spans of the
engine nest and are written with `with recorder.span(...)`; a loader's requests overlap and are begun and ended by number.

JAX computes behind the engine's back: a span around a computation covers handing it over, and the time appears where the engine next
needs a result. docs/architecture.md says which spans those are.
"""

import os
import struct
import time
from collections.abc import Sequence
from typing import Self

import numpy as np

from .trace_area import NAMED_STEPS, PAGE, PAUSED_AT, RECORD, SIZE_CLASSES, WRITTEN_AT, TraceArea

KINDS = (
    "start", "compile", "prompt", "step", "layer", "attention", "predict", "named", "look up", "prefetch", "ask", "hits", "misses",
    "block", "wait", "head", "sampling", "used", "request", "submit", "read", "recall",
)  # fmt: skip
(
    START, COMPILE, PROMPT, STEP, LAYER, ATTENTION, PREDICT, NAMED, LOOK_UP, PREFETCH, ASK, HITS, MISSES,
    BLOCK, WAIT, HEAD, SAMPLING, USED, REQUEST, SUBMIT, READ, RECALL,
) = range(len(KINDS))  # fmt: skip
"""Kinds of span, and what their values mean (second: the field `flow`):

  prompt: tokens. step, sampling: sequences. named: neurons named.
  look up: hits; second: misses. prefetch (its layer is the one asked for): neurons asked for; second: neurons guessed.
  ask: entries or bytes asked for; second: the request.
  hits, misses: neurons. block: its number. These, attention, head; second: a request whose bytes are used, 0: of none.
  used (no duration): second: one more such request of the enclosing span.
  recall (judging a predictor by the exact one): active neurons that it named << 32 | active ones; second: those that it named.
  request (accepted until done): bytes; second: the request. submit: reads begun. read (waiting for the disk): reads that came back.
"""

_COUNTED_TOGETHER = 32  # requests
_LARGEST_OF_CLASS = 1 << np.arange(SIZE_CLASSES)
COMPUTING = frozenset((HITS, MISSES, BLOCK, ATTENTION, HEAD))
"""Kinds that use what was asked for."""
_LOADER_BITS = 40

_WORD = 8
_RECORD_WORDS = RECORD.itemsize // _WORD
_END, _VALUE, _FLOW = 1, 2, 3  # words of a record
_PAUSED = PAUSED_AT // _WORD
assert struct.calcsize("<qqqqIHh") == RECORD.itemsize
_now, _write_record = time.perf_counter_ns, struct.Struct("<qqqqIHh").pack_into


def flow_of(loader: int, request: int) -> int:
    """One number for a request of a loader."""
    return (loader + 1) << _LOADER_BITS | request


class Off:
    """Records nothing."""

    step = 0
    descriptor: int | None = None
    sampled: Sequence[int] = ()
    on = False

    def span(self, kind: int, layer: int = -1, value: int = 0, flow: int = 0) -> Self:
        return self

    def tell(self, value: int, flow: int = 0) -> None: ...

    def begin(self, kind: int, layer: int = -1, value: int = 0, flow: int = 0) -> int:
        return 0

    def end(self, number: int, value: int = 0, flow: int = 0, at_ns: int = 0) -> None: ...

    def note(self, began_ns: int, kind: int, layer: int = -1, value: int = 0, flow: int = 0) -> None: ...

    def arrived(self, ticket: Sequence[tuple[int, int]]) -> None: ...

    def names(self, layer: int, neuron_ids: np.ndarray) -> None: ...

    def count_reads(self, lengths: np.ndarray, *, in_order: bool) -> None: ...

    def flush(self) -> None: ...

    def writer_for(self, loader: int) -> int:
        return -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Recorder(Off):
    """Writes into a region of a trace area. A context manager around the newest span.

    Attributes:
      step: the decoding step that is noted with every span.
      descriptor: of the area, for processes to inherit.
      sampled: layers of which more is kept.
    """

    on = True

    def __init__(self, area: TraceArea, number: int) -> None:
        self._area, self.descriptor, self.sampled, self.step = area, area.descriptor, area.sampled, 0
        self._memory, self._length = area.mapping, area.num_records
        self._words = memoryview(area.mapping)[: len(area.mapping) // _WORD * _WORD].cast("q")  # one is set faster than packed
        self._first, self._written = ((area.region(number) + at) // _WORD for at in (PAGE, WRITTEN_AT))
        self._next = 0
        self._open: list[tuple[int, int]] = []  # number and kind of the spans around this one
        self._rows = {layer: row for row, layer in enumerate(area.sampled)}
        self._named = np.zeros(int(area.header["d_ff"]), bool)
        self._arrived: list[tuple[int, int]] = []  # requests that are done and not used yet
        self._uncounted: tuple[list[np.ndarray], list[np.ndarray]] = [], []  # lengths of reads, see `count_reads`
        self._header = area.writer_header(number)
        self._header["pid"] = os.getpid()

    def begin(self, kind: int, layer: int = -1, value: int = 0, flow: int = 0) -> int:
        """Begins a span that `end` is called for, in any order; returns its number."""
        return self._write(_now(), 0, kind, layer, value, flow)

    def end(self, number: int, value: int = 0, flow: int = 0, at_ns: int = 0) -> None:
        """Ends it: now, or `at_ns` of before, for who had better to do then."""
        if 0 <= number >= self._next - self._length:  # else newer ones have taken its place
            words, at = self._words, self._first + number % self._length * _RECORD_WORDS
            words[at + _VALUE], words[at + _FLOW] = value, flow
            words[at + _END] = at_ns or _now()

    def note(self, began_ns: int, kind: int, layer: int = -1, value: int = 0, flow: int = 0) -> None:
        """A span that is over: what must not be held up is done first."""
        self._write(began_ns, _now(), kind, layer, value, flow)

    def span(self, kind: int, layer: int = -1, value: int = 0, flow: int = 0) -> Self:
        """Begins a span that ends with the `with` block."""
        if self._arrived and kind in COMPUTING:
            return self._using(kind, layer, value)
        self._open.append((self._write(_now(), 0, kind, layer, value, flow), kind))
        return self

    def tell(self, value: int, flow: int = 0) -> None:
        """What the innermost open span has to say."""
        number, _ = self._open[-1]
        if 0 <= number >= self._next - self._length:
            words, at = self._words, self._first + number % self._length * _RECORD_WORDS
            words[at + _VALUE], words[at + _FLOW] = value, flow

    def arrived(self, ticket: Sequence[tuple[int, int]]) -> None:
        """These requests (loader, number) are done, and this computation, or the next one, uses them."""
        self._arrived.extend(ticket)

    def names(self, layer: int, neuron_ids: np.ndarray) -> None:
        """Keeps which neurons a sampled layer's step names: ids [n]."""
        if layer in self._rows and not self._words[_PAUSED]:
            named, row = self._named, self.step % NAMED_STEPS
            named[neuron_ids] = True
            self._area.named[row, self._rows[layer]] = np.packbits(named)
            self._area.named_steps[row] = self.step
            named[neuron_ids] = False

    def count_reads(self, lengths: np.ndarray, *, in_order: bool) -> None:
        """Counts a request's finished reads [r] of so many bytes by size; `in_order`: of a stretch rather than of picked neurons.

        Many requests are counted together, later: one by one that takes a loader as long as the request's spans.
        """
        if self._words[_PAUSED]:
            return
        uncounted = self._uncounted[in_order]
        uncounted.append(lengths)
        if len(uncounted) == _COUNTED_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Counts what is to be counted; a process that is killed takes its last few requests' counts with it, but no span."""
        for in_order, uncounted in enumerate(self._uncounted):
            if uncounted:
                lengths = np.concatenate(uncounted)
                sizes = _LARGEST_OF_CLASS.searchsorted(lengths)
                self._header["reads"][in_order] += np.bincount(sizes, minlength=SIZE_CLASSES)
                self._header["read_bytes"][in_order] += np.bincount(sizes, lengths, SIZE_CLASSES).astype(np.int64)
                uncounted.clear()

    def writer_for(self, loader: int) -> int:
        """The region of a loader; -1: there is none left."""
        return loader + 1 if loader + 1 < self._area.num_writers else -1

    def _write(self, began_ns: int, ended_ns: int, kind: int, layer: int, value: int, flow: int) -> int:
        """The next record, and its number."""
        words = self._words
        if words[_PAUSED]:
            return -1
        number = self._next
        at = self._first + number % self._length * _RECORD_WORDS
        _write_record(self._memory, at * _WORD, began_ns, ended_ns, value, flow, self.step, kind, layer)
        self._next = words[self._written] = number + 1
        return number

    def _using(self, kind: int, layer: int, value: int) -> Self:
        """A computation's span, which names the first request that it uses itself."""
        first, *others = self._arrived
        self._open.append((self.begin(kind, layer, value, flow_of(*first)), kind))
        self._use(others)
        self._arrived.clear()
        return self

    def _use(self, requests: Sequence[tuple[int, int]]) -> None:
        for loader, request in requests:
            self.end(self.begin(USED), 0, flow_of(loader, request))

    def __exit__(self, *_: object) -> None:
        number, kind = self._open.pop()
        if self._arrived and kind in COMPUTING:  # in naive mode a layer's matrices arrive inside of its span
            self._use(self._arrived)
            self._arrived.clear()
        if 0 <= number >= self._next - self._length:
            self._words[self._first + number % self._length * _RECORD_WORDS + _END] = _now()


OFF = Off()
_recorder = OFF


def recorder() -> Off:
    """This process's recorder."""
    return _recorder


def attach(descriptor: int, number: int = 0) -> Off:
    """From now on this process records its spans as writer `number` of the area behind `descriptor`."""
    global _recorder
    _recorder = Recorder(TraceArea(descriptor), number)
    return _recorder


def detach() -> None:
    """What is made from now on is not recorded."""
    global _recorder
    _recorder = OFF
