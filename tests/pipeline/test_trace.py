"""Spans in shared memory: what is written is what is read, after a kill, after a wrap, and from several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from inflash.errors import RunError
from inflash.pipeline import trace
from inflash.pipeline.trace import ASK, ATTENTION, HITS, LAYER, LOOK_UP, OFF, READ, STEP, USED, WAIT, Recorder, flow_of
from inflash.pipeline.trace_area import NAMED_STEPS, TraceArea

WRITER = """
import json, sys, time
from inflash.pipeline import trace
recorder = trace.attach(*json.loads(sys.argv[1]))
with recorder.span(trace.STEP, value=2), recorder.span(trace.READ, 3) as inner:
    recorder.tell(7, 9)
print("written", flush=True)
with recorder.span(trace.WAIT):
    time.sleep(60)
"""


@pytest.fixture
def area() -> Iterator[TraceArea]:
    made = TraceArea.make(num_writers=3, num_layers=5, d_ff=20, num_records=64)
    yield made
    made.close()


def test_spans_nest_and_say_what_they_were_told(area: TraceArea) -> None:
    recorder = Recorder(area, 0)
    recorder.step = 5
    with recorder.span(STEP, value=2):
        for layer in range(2):
            with recorder.span(LAYER, layer), recorder.span(LOOK_UP, layer):
                recorder.tell(30 + layer, 4)
    records = area.read(0).records
    assert records["kind"].tolist() == [STEP, LAYER, LOOK_UP, LAYER, LOOK_UP]
    assert records["layer"].tolist() == [-1, 0, 0, 1, 1]
    assert records["value"].tolist() == [2, 0, 30, 0, 31] and records["flow"].tolist() == [0, 0, 4, 0, 4]
    assert set(records["step"].tolist()) == {5}
    step, first, inside, second, _ = records
    assert step["begin_ns"] < first["begin_ns"] < inside["begin_ns"] < inside["end_ns"] < first["end_ns"] < second["begin_ns"]
    assert records["end_ns"].max() == step["end_ns"] < time.perf_counter_ns()
    assert area.process_ids() == {0: os.getpid()}


def test_a_span_ends_when_what_it_covers_raises(area: TraceArea) -> None:
    recorder = Recorder(area, 1)
    with pytest.raises(KeyError), recorder.span(STEP):
        raise KeyError
    with recorder.span(LAYER, 1):
        pass
    assert (area.read(1).records["end_ns"] > 0).all()


def test_overlapping_spans_end_in_any_order(area: TraceArea) -> None:
    recorder = Recorder(area, 1)
    first, second = recorder.begin(READ), recorder.begin(READ)
    recorder.end(second, 2)
    recorder.end(first, 1)
    records = area.read(1).records
    assert records["value"].tolist() == [1, 2] and records["end_ns"][0] >= records["end_ns"][1]


def test_a_full_ring_keeps_the_newest_and_tells_how_many_are_lost(area: TraceArea) -> None:
    recorder = Recorder(area, 0)
    with recorder.span(STEP):  # its place is taken by newer ones before it ends
        for number in range(200):
            recorder.end(recorder.begin(LAYER, 0), number)
    found = area.read(0)
    assert found.lost == 201 - 64
    assert found.records["value"].tolist() == list(range(200 - 64, 200))
    assert (found.records["kind"] == LAYER).all()


def test_a_request_leads_to_the_next_computation_and_only_to_that(area: TraceArea) -> None:
    recorder = Recorder(area, 0)
    with recorder.span(ASK, 0, 3, flow_of(1, 12)):
        pass
    recorder.arrived([(1, 12), (0, 4)])
    for layer in range(2):
        with recorder.span(HITS, layer):
            pass
    records = area.read(0).records
    hits, used = (records[records["kind"] == kind] for kind in (HITS, USED))
    assert hits["flow"].tolist() == [flow_of(1, 12), 0] and used["flow"].tolist() == [flow_of(0, 4)]
    assert hits["begin_ns"][0] < used["begin_ns"][0] < hits["end_ns"][0]


def test_a_request_that_arrives_inside_of_a_computation_is_used_by_it(area: TraceArea) -> None:
    recorder = Recorder(area, 0)
    with recorder.span(ATTENTION, 0), recorder.span(WAIT):
        recorder.arrived([(0, 4)])
    with recorder.span(HITS, 0):
        pass
    records = area.read(0).records
    assert records["kind"].tolist() == [ATTENTION, WAIT, USED, HITS]
    assert records["begin_ns"][2] <= records["end_ns"][0]


def test_what_was_going_on_when_a_process_was_killed_is_there(area: TraceArea) -> None:
    before = time.perf_counter_ns()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, json.dumps([area.descriptor, 2])], pass_fds=(area.descriptor,), stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    deadline = time.monotonic() + 30
    while len(area.read(2).records) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = area.read(2)
    assert found.pid == process.pid and found.name == "loader 1"
    assert [trace.KINDS[kind] for kind in found.records["kind"]] == ["step", "read", "wait"]
    assert found.records["value"][1] == 7 and found.records["flow"][1] == 9
    assert found.records["end_ns"][2] == 0
    # One clock for all processes: its times lie between two of this one's.
    assert before < found.records["begin_ns"].min() and found.records["end_ns"].max() < time.perf_counter_ns()


def test_named_neurons_are_kept_for_some_layers_and_the_last_steps(area: TraceArea) -> None:
    recorder, rng = Recorder(area, 0), np.random.default_rng(3)
    assert area.sampled == [0, 1, 3, 4]
    steps = NAMED_STEPS + 3
    named = rng.random((steps, 5, 20)) < 0.3
    for recorder.step in range(steps):
        for layer in range(5):
            recorder.names(layer, np.flatnonzero(named[recorder.step, layer]).astype(np.int32))
    kept, found = area.named_neurons()
    assert kept.tolist() == list(range(3, steps))
    np.testing.assert_array_equal(found, named[3:, [0, 1, 3, 4]])


def test_reads_are_counted_by_size_and_kind(area: TraceArea) -> None:
    recorder = Recorder(area, 1)
    recorder.count_reads(np.array([4096, 4096, 4097, 1 << 20]), in_order=False)
    recorder.count_reads(np.array([1 << 20]), in_order=True)
    recorder.flush()
    recorder.flush()
    found = area.read(1)
    assert {size: count for size, count in enumerate(found.reads[0].tolist()) if count} == {12: 2, 13: 1, 20: 1}
    assert found.read_bytes[0].sum() == 8192 + 4097 + (1 << 20) and found.read_bytes[1, 20] == 1 << 20
    for _ in range(40):  # the first thirty-two of them as soon as they are there
        recorder.count_reads(np.array([1, 4096]), in_order=False)
    assert area.read(1).reads[0, [0, 12]].tolist() == [32, 2 + 32]


def test_without_anybody_asking_nothing_is_recorded() -> None:
    assert trace.recorder() is OFF and not OFF.on and OFF.descriptor is None
    with OFF.span(STEP) as span:
        span.tell(1, 2)
    OFF.end(OFF.begin(READ))
    OFF.arrived([(0, 1)])
    OFF.flush()
    assert OFF.writer_for(0) == -1


def test_loaders_beyond_the_area_are_not_recorded(area: TraceArea) -> None:
    assert [Recorder(area, 0).writer_for(loader) for loader in range(3)] == [1, 2, -1]


def test_other_memory_is_refused() -> None:
    descriptor = os.memfd_create("other")
    os.ftruncate(descriptor, 8192)
    try:
        with pytest.raises(RunError, match="another version of inflash"):
            TraceArea(descriptor)
    finally:
        os.close(descriptor)


def test_kinds_have_names_of_their_own() -> None:
    assert len(set(trace.KINDS)) == len(trace.KINDS)
    assert trace.KINDS[trace.RECALL] == "recall" and all(first < second for first, second in pairwise((STEP, LAYER, HITS)))


def test_a_paused_recorder_writes_nothing_and_goes_on(area: TraceArea) -> None:
    recorder = Recorder(area, 0)
    with recorder.span(STEP):
        area.pause(True)
        with recorder.span(LAYER, 2):
            recorder.tell(9)
        recorder.names(0, np.arange(3, dtype=np.int32))
        recorder.count_reads(np.array([4096]), in_order=False)
        area.pause(False)
        with recorder.span(HITS, 1):
            recorder.tell(4)
    found = area.read(0)
    assert found.records["kind"].tolist() == [STEP, HITS] and found.records["value"].tolist() == [0, 4]
    assert (found.records["end_ns"] > 0).all() and not found.reads.any() and len(area.named_neurons()[0]) == 0
