"""What a profiled run's spans add up to: a token's time by part and layer, reads, hit rates, the working set.

Axes: n records, S decoding steps, L sampled layers, F d_ff.

Everything is of decoding steps unless it says otherwise. A wait is counted once, wherever it happened: memory management is what its spans
last, less the waits in them, and compute is the rest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..pipeline.trace import HEAD, LAYER, LOOK_UP, PREFETCH, PROMPT, READ, RECALL, REQUEST, SAMPLING, STEP, SUBMIT, WAIT
from ..pipeline.trace_area import RECORD, WriterTrace

_MOST_POINTS = 512  # of the course


def engine_figures(records: np.ndarray) -> dict[str, Any]:
    """The profile's "token", "prompts", "layers" and "course", from the engine's records [n]; unfinished spans are left out."""
    records = records[records["end_ns"] > 0]
    spans = {kind: records[records["kind"] == kind] for kind in (STEP, LAYER, LOOK_UP, PREFETCH, WAIT, HEAD, SAMPLING, PROMPT)}
    steps = spans[STEP]
    parts = _Parts(spans)
    count = max(len(steps), 1)
    step_ns = _lengths(steps)
    return {
        "token": {
            "steps": len(steps),
            "io_wait_ms": float(parts.wait_of(steps).sum()) / 1e6 / count,
            "memory_ms": float(parts.memory_of(steps).sum()) / 1e6 / count,
            "compute_ms": float((step_ns - parts.wait_of(steps) - parts.memory_of(steps)).sum()) / 1e6 / count,
            "total_ms": float(step_ns.sum()) / 1e6 / count,
            "median_ms": float(np.median(step_ns)) / 1e6 if len(steps) else 0.0,
            "head_ms": float(_lengths(spans[HEAD]).sum()) / 1e6 / max(len(spans[HEAD]), 1),
            "sampling_ms": float(_lengths(spans[SAMPLING]).sum()) / 1e6 / max(len(spans[SAMPLING]), 1),
        },
        "prompts": {
            "count": len(spans[PROMPT]),
            "tokens": int(spans[PROMPT]["value"].sum()),
            "s": float(_lengths(spans[PROMPT]).sum()) / 1e9,
        },
        "layers": _layers(spans, parts),
        "course": _course(spans, parts),
    }


class _Parts:
    """Which waits and which memory management fall into given spans, in ns."""

    def __init__(self, spans: dict[int, np.ndarray]) -> None:
        self._waits = spans[WAIT]
        self._memory = np.concatenate((spans[LOOK_UP], spans[PREFETCH]))
        self._memory = self._memory[np.argsort(self._memory["begin_ns"], kind="stable")]
        self._memory_ns = _lengths(self._memory) - sums_within(self._memory, self._waits, _lengths(self._waits))

    def wait_of(self, outer: np.ndarray) -> np.ndarray:
        return sums_within(outer, self._waits, _lengths(self._waits))

    def memory_of(self, outer: np.ndarray) -> np.ndarray:
        return sums_within(outer, self._memory, self._memory_ns)


def sums_within(outer: np.ndarray, inner: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """For each of the outer spans, which do not overlap and ascend, the sum of the amounts of the inner ones that begin in it."""
    totals = np.zeros(len(outer))
    places, inside = _begins_within(outer, inner)
    np.add.at(totals, places[inside], amounts[inside])
    return totals


def _begins_within(outer: np.ndarray, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each inner span the last outer one that began before it, and whether it begins in that one."""
    places = np.searchsorted(outer["begin_ns"], inner["begin_ns"], side="right") - 1
    if not len(outer):
        return places, np.zeros(len(inner), bool)
    return places, (places >= 0) & (inner["begin_ns"] < outer["end_ns"][np.maximum(places, 0)])


def _lengths(spans: np.ndarray) -> np.ndarray:
    return (spans["end_ns"] - spans["begin_ns"]).astype(np.float64)


def decoding_span_ns(records: np.ndarray) -> tuple[int, int] | None:
    """From the first decoding step's beginning to the last one's end; None: there was none."""
    steps = records[(records["kind"] == STEP) & (records["end_ns"] > 0)]
    return (int(steps["begin_ns"][0]), int(steps["end_ns"].max())) if len(steps) else None


def _layers(spans: dict[int, np.ndarray], parts: _Parts) -> list[dict[str, Any]]:
    """A mean step's time and neurons by layer."""
    layers, waits, memory, lengths = (
        spans[LAYER],
        parts.wait_of(spans[LAYER]),
        parts.memory_of(spans[LAYER]),
        _lengths(spans[LAYER]),
    )
    found = []
    for layer in np.unique(layers["layer"]).tolist():
        mine = layers["layer"] == layer
        count = int(mine.sum())
        looked, asked = (spans[kind][spans[kind]["layer"] == layer] for kind in (LOOK_UP, PREFETCH))
        hits, misses = int(looked["value"].sum()), int(looked["flow"].sum())
        wait, managed, total = float(waits[mine].sum()), float(memory[mine].sum()), float(lengths[mine].sum())
        found.append(
            {
                "layer": layer,
                "io_wait_ms": wait / 1e6 / count,
                "memory_ms": managed / 1e6 / count,
                "compute_ms": (total - wait - managed) / 1e6 / count,
                "hits": hits / count,
                "misses": misses / count,
                "prefetched": int(asked["value"].sum()) / count,
                "hit_rate": hits / (hits + misses) if hits + misses else None,
            }
        )
    return found


def _course(spans: dict[int, np.ndarray], parts: _Parts) -> dict[str, list[float]]:
    """Step by step, or means of equally many steps where there are more than `_MOST_POINTS`."""
    steps, looked = spans[STEP], spans[LOOK_UP]
    columns = {
        "step": steps["step"].astype(np.float64),
        "total_ms": _lengths(steps) / 1e6,
        "io_wait_ms": parts.wait_of(steps) / 1e6,
        "memory_ms": parts.memory_of(steps) / 1e6,
        "hits": sums_within(steps, looked, looked["value"].astype(np.float64)),
        "misses": sums_within(steps, looked, looked["flow"].astype(np.float64)),
    }
    width = -(-len(steps) // _MOST_POINTS) if len(steps) else 1
    starts = np.arange(0, len(steps), width)
    sizes = np.diff(np.append(starts, len(steps)))
    return {name: (np.add.reduceat(values, starts) / sizes).tolist() if len(steps) else [] for name, values in columns.items()}


def read_figures(engine: np.ndarray, loaders: Sequence[WriterTrace], depth: int) -> dict[str, Any]:
    """The profile's "reads": what was under way during decoding steps, at what rate, and reads by size over the whole run.

    Args:
      engine: its records.
      loaders: their traces.
      depth: reads that all of them together may have under way.
    """
    steps = engine[(engine["kind"] == STEP) & (engine["end_ns"] > 0)]
    # Steps whose reads newer ones have replaced in the ring would look as if nothing had been read.
    known_since = max((int(trace.records["begin_ns"][0]) for trace in loaders if trace.lost), default=0)
    steps = steps[steps["begin_ns"] >= known_since]
    step_ns, count = float(_lengths(steps).sum()), max(len(steps), 1)
    waits = engine[(engine["kind"] == WAIT) & (engine["end_ns"] > 0)]
    waits = waits[_begins_within(steps, waits)[1]]
    times, under_way = _under_way(loaders)
    reading, asked = (under_way > 0).astype(np.int64), _open_requests(loaders)
    in_flight_ns, busy_ns = _integral(times, under_way, steps), _integral(times, reading, steps)
    requests = _finished(loaders, REQUEST)
    num_bytes = sums_within(steps, requests, requests["value"].astype(np.float64)).sum()
    submits = _finished(loaders, SUBMIT)
    num_reads = sums_within(steps, submits, submits["value"].astype(np.float64)).sum()
    sizes = _sizes(loaders)
    mean_bytes = _mean_read(sizes, num_bytes, num_reads)
    return {
        "per_step": num_reads / count,
        "bytes_per_step": num_bytes / count,
        "mean_bytes": mean_bytes,
        "depth": depth,
        "mean_under_way": in_flight_ns / busy_ns if busy_ns else 0.0,
        "busy_share": busy_ns / step_ns if step_ns else 0.0,
        "bytes_per_s": mean_bytes * num_reads / (busy_ns / 1e9) if busy_ns else 0.0,
        "request_ms": float(np.median(_lengths(requests))) / 1e6 if len(requests) else 0.0,
        "asked_share": _integral(*asked, steps) / step_ns if step_ns else 0.0,
        "wait_reading_ms": _integral(times, reading, waits) / 1e6 / count,
        "wait_asked_ms": _integral(*asked, waits) / 1e6 / count,
        "sizes": sizes,
    }


def _finished(loaders: Sequence[WriterTrace], kind: int) -> np.ndarray:
    """Of all loaders, the spans of a kind that have ended."""
    records = np.concatenate([trace.records for trace in loaders]) if loaders else np.empty(0, RECORD)
    return records[(records["kind"] == kind) & (records["end_ns"] > 0)]


def _mean_read(sizes: Sequence[dict[str, int]], num_bytes: float, num_reads: float) -> float:
    """Bytes of a read while decoding. Picked neurons are read then and only then, with the gaps between them."""
    reads, picked = (sum(size[name] for size in sizes) for name in ("picked", "picked_bytes"))
    return max(num_bytes / num_reads, picked / reads if reads else 0.0) if num_reads else 0.0


def _under_way(loaders: Sequence[WriterTrace]) -> tuple[np.ndarray, np.ndarray]:
    """When the number of reads under way changed [n] int64, and to what [n].

    A read counts from the call that hands it to the kernel, in which it begins, as it does in the disk's curve.
    """
    times, changes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for trace in loaders:
        records = trace.records[np.isin(trace.records["kind"], (SUBMIT, READ)) & (trace.records["end_ns"] > 0)]
        begins = records["kind"] == SUBMIT
        times.append(np.where(begins, records["begin_ns"], records["end_ns"]))
        levels = np.cumsum(np.where(begins, 1, -1) * records["value"])
        # Where the oldest records are lost the count begins too low.
        changes.append(np.diff(levels - min(int(levels.min(initial=0)), 0), prepend=0))
    return _levels(np.concatenate(times), np.concatenate(changes))


def _open_requests(loaders: Sequence[WriterTrace]) -> tuple[np.ndarray, np.ndarray]:
    """When it changed whether any loader had a request to serve [n] int64, and to 0 or 1 [n]."""
    requests = _finished(loaders, REQUEST)
    ones = np.ones(len(requests), np.int64)
    times, levels = _levels(np.concatenate((requests["begin_ns"], requests["end_ns"])), np.concatenate((ones, -ones)))
    return times, (levels > 0).astype(np.int64)


def _levels(times: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(changes[order])


def _integral(times: np.ndarray, levels: np.ndarray, spans: np.ndarray) -> float:
    """Level x ns over all spans."""
    if not len(times) or not len(spans):
        return 0.0
    area = np.concatenate(([0.0], np.cumsum(np.diff(times) * levels[:-1].astype(np.float64))))
    return float((np.interp(spans["end_ns"], times, area) - np.interp(spans["begin_ns"], times, area)).sum())


def _sizes(loaders: Sequence[WriterTrace]) -> list[dict[str, int]]:
    """Reads by size: those of up to "up_to_bytes" that no smaller class holds."""
    if not loaders:
        return []
    reads, num_bytes = (np.sum([getattr(trace, name) for trace in loaders], axis=0) for name in ("reads", "read_bytes"))
    return [
        {
            "up_to_bytes": 1 << size,
            "picked": int(reads[0, size]),
            "picked_bytes": int(num_bytes[0, size]),
            "in_order": int(reads[1, size]),
            "in_order_bytes": int(num_bytes[1, size]),
        }
        for size in np.flatnonzero(reads.sum(axis=0)).tolist()
    ]


def recall_figures(engine: np.ndarray) -> dict[str, Any] | None:
    """The profile's "predictor_recall"; None where no predictor was judged."""
    records = engine[(engine["kind"] == RECALL) & (engine["end_ns"] > 0)]
    if not len(records):
        return None
    both, active, named = records["value"] >> 32, records["value"] & 0xFFFFFFFF, records["flow"]
    layers = []
    for layer in np.unique(records["layer"]).tolist():
        mine = records["layer"] == layer
        layers.append({"layer": layer, "recall": float(both[mine].sum() / max(active[mine].sum(), 1))})
    return {
        "layers": layers,
        "steps": len(np.unique(records["step"])),
        "recall": float(both.sum() / max(active.sum(), 1)),
        "named_per_active": float(named.sum() / max(active.sum(), 1)),
    }


def working_set(layers: Sequence[int], named: np.ndarray) -> list[dict[str, Any]]:
    """How many neurons the last k tokens named, together, for k = 1, 2, 4, ...

    Args:
      layers: L of them.
      named: [S, L, F] bool.

    Returns:
      For each layer and k the mean share of F, and "missed": of the neurons that the token after those k named, the share that they
      had not; None for a window that no token came after. Reference: arXiv:2312.11514, 3.1 (aggregated neuron use).
    """
    found, tokens, union = [], 1, named
    while tokens <= len(named):
        shares, following = union.mean(axis=(0, 2)), named[tokens:]
        new = (following & ~union[: len(following)]).sum(axis=(0, 2)) / np.maximum(following.sum(axis=(0, 2)), 1)
        found += [
            {"layer": layer, "tokens": tokens, "share": float(share), "missed": float(missed) if len(following) else None}
            for layer, share, missed in zip(layers, shares, new, strict=True)
        ]
        union = union[tokens:] | union[:-tokens]
        tokens *= 2
    return found
