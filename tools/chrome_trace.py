"""A run's spans and samples as Chrome trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process a process and one track a thread: the engine's spans nest as token, layer, part. A loader's requests overlap, so each stands
on the first free of a few tracks of its own. Arrows (flow events) lead from the request to its read and to the computation that used it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.trace import ASK, COMPUTING, KINDS, LAYER, LOOK_UP, PREFETCH, READ, REQUEST, STEP, SUBMIT, USED
from ..pipeline.trace_area import WriterTrace

_ARGUMENTS = {  # what a span's value and second value are called
    "prompt": ("tokens", None), "step": ("sequences", None), "sampling": ("sequences", None), "named": ("neurons", None),
    "look up": ("hits", "misses"), "prefetch": ("asked_for", "guessed"), "ask": ("amount", "request"), "hits": ("neurons", None),
    "misses": ("neurons", None), "block": ("block", None), "request": ("bytes", "request"), "submit": ("reads", None),
    "read": ("reads", None),
}  # fmt: skip
_FLOWING = {ASK: "s", REQUEST: "t", **dict.fromkeys(COMPUTING, "f")}  # phases of an arrow

Event = dict[str, Any]


def write_trace(
    file: Path, traces: Sequence[WriterTrace], processes: dict[str, Any], origin_ns: int, notes: dict[str, Any]
) -> None:
    """Writes all events, one a line.

    Args:
      file: to write.
      traces: of every process.
      processes: the samples, as `ProcessSampler.document` gives them.
      origin_ns: time 0.
      notes: about the run, in JSON's types.
    """
    with file.open("w", encoding="utf-8") as stream:
        stream.write('{"displayTimeUnit": "ms", "otherData": ' + json.dumps(notes) + ', "traceEvents": [\n')
        separator = ""
        for event in _events(traces, processes, origin_ns):
            stream.write(separator + json.dumps(event))
            separator = ",\n"
        stream.write("\n]}\n")


def _events(traces: Sequence[WriterTrace], processes: dict[str, Any], origin_ns: int) -> Iterator[Event]:
    asked = {int(flow) for trace in traces for flow in trace.records["flow"][trace.records["kind"] == ASK]}
    for order, trace in enumerate(traces):
        yield _metadata(trace.pid, 0, "process_name", name=f"inflash {trace.name}")
        yield _metadata(trace.pid, 0, "process_sort_index", sort_index=order)
        yield _metadata(trace.pid, trace.pid, "thread_name", name=trace.name)
        yield from _Track(trace, asked, origin_ns).events()
    for process in processes.values():
        yield from _sample_counters(process)


class _Track:
    """The events of one process."""

    def __init__(self, trace: WriterTrace, asked: set[int], origin_ns: int) -> None:
        self._pid, self._name, self._records = trace.pid, trace.name, trace.records
        self._asked, self._origin = asked, origin_ns
        ends = trace.records["end_ns"]
        # What was going on when the process ended is drawn up to its last sign of life.
        self._last = int(max(ends.max(initial=0), trace.records["begin_ns"].max(initial=0)))
        self._lanes: list[int] = []
        self._under_way = 0

    def events(self) -> Iterator[Event]:
        for record in self._records.tolist():
            begin, end, value, flow, step, kind, layer = record
            if kind == USED:
                if flow in self._asked:
                    yield self._flow("f", self._pid, begin, flow) | {"bp": "e"}
                continue
            thread, lanes = self._pid, len(self._lanes)
            if kind == REQUEST:
                thread = self._lane(begin, end or self._last)
            if len(self._lanes) > lanes:
                yield _metadata(self._pid, thread, "thread_name", name=f"{self._name} requests {len(self._lanes)}")
            yield self._span(thread, begin, end, _name(kind, step, layer), self._arguments(record))
            if flow in self._asked and kind in _FLOWING:
                yield self._flow(_FLOWING[kind], thread, begin, flow) | ({"bp": "e"} if kind in COMPUTING else {})
            yield from self._counters(kind, begin, end or self._last, layer, value, flow)

    def _lane(self, begin: int, end: int) -> int:
        """The track of a request: the first that is free."""
        for number, free_from in enumerate(self._lanes):
            if free_from <= begin:
                self._lanes[number] = end
                return 100 * self._pid + number  # no process has such a number
        self._lanes.append(end)
        return 100 * self._pid + len(self._lanes) - 1

    def _span(self, thread: int, begin: int, end: int, name: str, arguments: dict[str, Any]) -> Event:
        if not end:
            arguments["unfinished"] = True
        return {
            "ph": "X", "name": name, "pid": self._pid, "tid": thread, "ts": self._us(begin),
            "dur": ((end or self._last) - begin) / 1000, "args": arguments,
        }  # fmt: skip

    def _flow(self, phase: str, thread: int, at: int, flow: int) -> Event:
        return {
            "ph": phase, "name": "neurons", "cat": "request", "id": flow, "pid": self._pid, "tid": thread, "ts": self._us(at),
        }  # fmt: skip

    def _counters(self, kind: int, begin: int, end: int, layer: int, value: int, second: int) -> Iterator[Event]:
        if kind == LOOK_UP:
            yield _counter(self._pid, "cache", self._us(begin), {"hits": value, "misses": second})
        elif kind == PREFETCH:
            yield _counter(self._pid, "prefetched", self._us(begin), {"neurons": value})
        elif kind in (SUBMIT, READ):
            self._under_way = max(0, self._under_way + (value if kind == SUBMIT else -value))
            at = begin if kind == SUBMIT else end
            yield _counter(self._pid, "reads under way", self._us(at), {"reads": self._under_way})

    def _us(self, at_ns: int) -> float:
        return (at_ns - self._origin) / 1000

    @staticmethod
    def _arguments(record: tuple[int, ...]) -> dict[str, Any]:
        _, _, value, second, step, kind, layer = record
        names = _ARGUMENTS.get(KINDS[kind], (None, None))
        found = {name: amount for name, amount in zip(names, (value, second), strict=True) if name}
        if layer >= 0:
            found["layer"] = layer
        if kind not in (REQUEST, SUBMIT, READ):
            found["step"] = step
        return found


def _name(kind: int, step: int, layer: int) -> str:
    if kind == STEP:
        return f"token {step}"
    if kind == LAYER:
        return f"layer {layer}"
    return KINDS[kind]


def _metadata(pid: int, thread: int, what: str, **arguments: Any) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": thread, "args": arguments}


def _counter(pid: int, name: str, at_us: float, values: dict[str, float]) -> Event:
    return {"ph": "C", "name": name, "pid": pid, "ts": at_us, "args": values}


def _sample_counters(process: dict[str, Any]) -> Iterator[Event]:
    pid, samples = process["pid"], process["samples"]
    at = np.array(samples["at_s"]) * 1e6
    for first, second in zip(range(len(at)), range(1, len(at)), strict=False):
        seconds = (at[second] - at[first]) / 1e6
        shares = {
            name.removesuffix("_s"): 100 * (samples[name][second] - samples[name][first]) / seconds
            for name in ("user_s", "system_s")
        }
        yield _counter(pid, "CPU %", float(at[first]), shares)
    for place, size in enumerate(samples["pss_bytes"]):
        if size is not None:
            yield _counter(pid, "PSS MiB", float(at[place]), {"PSS": size / 2**20})
