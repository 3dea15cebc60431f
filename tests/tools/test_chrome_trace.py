"""Trace events: valid JSON whose spans nest, whose requests have tracks of their own, and whose arrows lead somewhere."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflash.pipeline import trace
from inflash.pipeline.trace import flow_of
from inflash.pipeline.trace_area import RECORD, SIZE_CLASSES, WriterTrace
from inflash.tools.chrome_trace import write_trace

FLOW, SECOND = flow_of(0, 1), flow_of(0, 3)
SAMPLES: dict[str, Any] = {
    "engine": {
        "pid": 50,
        "samples": {"at_s": [0.0, 0.5], "user_s": [1.0, 1.4], "system_s": [0.0, 0.1], "pss_bytes": [1 << 20, None]},
    }
}


def writer(number: int, *rows: tuple[int, int, int, int, int, int, int]) -> WriterTrace:
    """(kind, begin us, end us, layer, step, value, flow) each."""
    records = np.zeros(len(rows), RECORD)
    for place, (kind, begin, end, layer, step, value, flow) in enumerate(rows):
        records[place] = (1000 * begin, 1000 * end, value, flow, step, kind, layer)
    sizes = np.zeros((2, SIZE_CLASSES), np.int64)
    return WriterTrace(number=number, pid=50 + number, records=records, lost=0, reads=sizes, read_bytes=sizes)


@pytest.fixture
def events(tmp_path: Path) -> list[dict[str, Any]]:
    engine = writer(
        0,
        (trace.STEP, 100, 200, -1, 4, 1, 0),
        (trace.LAYER, 101, 199, 0, 4, 0, 0),
        (trace.LOOK_UP, 102, 110, 0, 4, 30, 12),
        (trace.ASK, 104, 105, 0, 4, 12, FLOW),
        (trace.ASK, 111, 112, 0, 4, 2, SECOND),
        (trace.MISSES, 150, 160, 0, 4, 12, FLOW),
        (trace.USED, 151, 151, 0, 4, 0, SECOND),
        (trace.USED, 152, 152, 0, 4, 0, flow_of(0, 99)),  # whose request was lost
    )
    loader = writer(
        1,
        (trace.REQUEST, 106, 140, 0, 0, 4096, FLOW),
        (trace.SUBMIT, 107, 109, -1, 0, 12, 0),
        (trace.READ, 110, 139, -1, 0, 12, 0),
        (trace.REQUEST, 120, 0, 1, 0, 0, flow_of(0, 2)),  # the loader was killed
        (trace.REQUEST, 145, 148, 1, 0, 8192, SECOND),
    )
    write_trace(tmp_path / "trace.json", [engine, loader], SAMPLES, 50_000, {"why": "a test"})
    document = json.loads((tmp_path / "trace.json").read_text())
    assert document["otherData"] == {"why": "a test"} and document["displayTimeUnit"] == "ms"
    return document["traceEvents"]


def of(events: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [event for event in events if all(event.get(key) == value for key, value in wanted.items())]


def test_every_process_and_track_has_a_name(events: list[dict[str, Any]]) -> None:
    processes = {event["pid"]: event["args"]["name"] for event in of(events, ph="M", name="process_name")}
    assert processes == {50: "inflash engine", 51: "inflash loader 0"}
    named = {(event["pid"], event["tid"]) for event in of(events, ph="M", name="thread_name")}
    assert {(event["pid"], event["tid"]) for event in of(events, ph="X")} == named


def test_spans_of_a_track_nest(events: list[dict[str, Any]]) -> None:
    tracks = defaultdict(list)
    for event in of(events, ph="X"):
        tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(tracks) == 4  # the engine, the loader, and two for its requests, of which two overlap
    for spans in tracks.values():
        for (begin, end), (next_begin, next_end) in pairwise(sorted(spans, key=lambda span: (span[0], -span[1]))):
            assert next_begin >= end or (begin <= next_begin and next_end <= end)
    (token,), (layer,) = of(events, name="token 4"), of(events, name="layer 0")
    assert (token["ts"], token["dur"]) == (50.0, 100.0) and layer["args"]["layer"] == 0


def test_an_arrow_leads_from_the_request_to_its_read_to_its_use(events: list[dict[str, Any]]) -> None:
    arrows = [event for event in events if event["ph"] in "stf"]
    assert [(event["ph"], event["pid"], event["id"]) for event in sorted(arrows, key=lambda event: event["ts"])] == [
        ("s", 50, FLOW), ("t", 51, FLOW), ("s", 50, SECOND), ("t", 51, SECOND), ("f", 50, FLOW), ("f", 50, SECOND),
    ]  # fmt: skip
    for arrow in arrows:
        around = [
            span
            for span in of(events, ph="X", pid=arrow["pid"], tid=arrow["tid"])
            if span["ts"] <= arrow["ts"] <= span["ts"] + span["dur"]
        ]
        assert {"s": "ask", "t": "request", "f": "misses"}[arrow["ph"]] in [span["name"] for span in around]
    assert all(arrow["bp"] == "e" for arrow in of(events, ph="f"))


def test_what_a_killed_process_was_doing_is_drawn_to_its_last_sign_of_life(events: list[dict[str, Any]]) -> None:
    (cut,) = [event for event in of(events, name="request") if event["args"].get("unfinished")]
    assert (cut["ts"], cut["dur"]) == (70.0, 28.0)


def test_counters(events: list[dict[str, Any]]) -> None:
    assert [event["args"] for event in of(events, ph="C", name="cache")] == [{"hits": 30, "misses": 12}]
    assert [(event["ts"], event["args"]["reads"]) for event in of(events, ph="C", name="reads under way")] == [
        (57.0, 12),
        (89.0, 0),
    ]
    (cpu,) = of(events, ph="C", name="CPU %")
    assert cpu["args"] == pytest.approx({"user": 80, "system": 20})
    assert [event["args"] for event in of(events, ph="C", name="PSS MiB")] == [{"PSS": 1.0}]
