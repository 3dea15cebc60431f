"""What spans add up to, beside the plain way of counting it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from inflash.pipeline import trace
from inflash.pipeline.trace_area import RECORD, SIZE_CLASSES, WriterTrace
from inflash.tools.profile_figures import engine_figures, read_figures, sums_within, working_set

MS = 1_000_000


def records(*rows: tuple[int, float, float, int, int, int, int]) -> np.ndarray:
    """(kind, begin ms, end ms, layer, step, value, flow) each."""
    made = np.zeros(len(rows), RECORD)
    for place, (kind, begin, end, layer, step, value, flow) in enumerate(rows):
        made[place] = (begin * MS, end * MS, value, flow, step, kind, layer)
    return made[np.argsort(made["begin_ns"], kind="stable")]


def loader(*rows: Any, number: int = 1) -> WriterTrace:
    sizes = np.zeros((2, SIZE_CLASSES), np.int64)
    sizes[0, 12], sizes[1, 20] = 5, 2
    return WriterTrace(number=number, pid=7, records=records(*rows), lost=0, reads=sizes, read_bytes=sizes * 4096)


def two_steps() -> np.ndarray:
    """Each of 20 ms, two layers: a wait of 3 ms inside memory management of 5 ms, and one of 2 ms by itself; 1 ms outside of layers."""
    rows = [(trace.PROMPT, 0, 9, -1, 0, 11, 0), (trace.WAIT, 2, 4, -1, 0, 0, 0)]  # a prompt's wait is no step's
    for step, at in enumerate((10, 40)):
        rows.append((trace.STEP, at, at + 20, -1, step, 1, 0))
        for layer in range(2):
            start = at + 8 * layer
            rows += [
                (trace.LAYER, start, start + 8, layer, step, 0, 0),
                (trace.LOOK_UP, start + 1, start + 6, layer, step, 30, 10 * (1 + layer)),
                (trace.WAIT, start + 2, start + 5, -1, step, 0, 0),
                (trace.WAIT, start + 6, start + 8, -1, step, 0, 0),
            ]
        rows += [(trace.HEAD, at + 16, at + 19, -1, step, 0, 0), (trace.SAMPLING, at + 20, at + 21, -1, step, 1, 0)]
    return records(*rows)


def test_a_token_s_time_is_split_and_every_wait_counted_once() -> None:
    found = engine_figures(two_steps())
    assert found["token"] == pytest.approx(
        {
            "steps": 2, "io_wait_ms": 10, "memory_ms": 4, "compute_ms": 6, "total_ms": 20, "median_ms": 20, "head_ms": 3, "sampling_ms": 1,
        }
    )  # fmt: skip
    assert found["prompts"] == pytest.approx({"count": 1, "tokens": 11, "s": 0.009})
    for layer in found["layers"]:
        assert (layer["io_wait_ms"], layer["memory_ms"], layer["compute_ms"]) == pytest.approx((5, 2, 1))
    assert [(layer["hits"], layer["misses"]) for layer in found["layers"]] == [(30, 10), (30, 20)]
    assert [layer["hit_rate"] for layer in found["layers"]] == [0.75, 0.6]
    assert found["course"]["hits"] == [60, 60] and found["course"]["misses"] == [30, 30]
    assert found["course"]["io_wait_ms"] == pytest.approx([10, 10])


def test_an_unfinished_step_and_an_empty_trace() -> None:
    cut = two_steps()
    cut["end_ns"][cut["begin_ns"] == 40 * MS] = 0  # the engine was killed in its second step
    assert engine_figures(cut)["token"]["steps"] == 1
    nothing = engine_figures(records())
    assert nothing["token"]["steps"] == 0 and nothing["layers"] == [] and nothing["course"]["step"] == []


def test_sums_within_is_what_a_loop_counts() -> None:
    rng = np.random.default_rng()
    ends = np.cumsum(rng.integers(1, 9, 40))
    outer = records(*((trace.STEP, a, b, -1, 0, 0, 0) for a, b in zip(ends[:-1:2], ends[1::2], strict=False)))
    starts = np.sort(rng.integers(0, ends[-1] + 5, 100))
    inner = records(*((trace.WAIT, start, start + 1, -1, 0, 0, 0) for start in starts))
    amounts = rng.random(100)
    expected = [
        sum(amount for one, amount in zip(inner, amounts, strict=True) if o["begin_ns"] <= one["begin_ns"] < o["end_ns"])
        for o in outer
    ]
    np.testing.assert_allclose(sums_within(outer, inner, amounts), expected)


def test_reads_are_those_of_decoding_steps() -> None:
    """Two loaders, one step from 10 to 20 ms: 4 reads under way for 4 ms, then 6 for 2 ms, then 2 for 2 ms, and none for 2 ms."""
    step = records((trace.STEP, 10, 20, -1, 0, 1, 0))
    loaders = [
        loader(
            (trace.SUBMIT, 1, 2, -1, 0, 50, 0), (trace.READ, 2, 3, -1, 0, 50, 0),  # before the step
            (trace.REQUEST, 10, 16, 0, 0, 4 * 4096, 1), (trace.SUBMIT, 10, 12, -1, 0, 4, 0), (trace.READ, 10, 16, -1, 0, 4, 0),
        ),
        loader(
            (trace.REQUEST, 14, 18, 0, 0, 2 * 8192, 1), (trace.SUBMIT, 14, 14, -1, 0, 2, 0), (trace.READ, 14, 18, -1, 0, 2, 0), number=2,
        ),
    ]  # fmt: skip
    found = read_figures(step, loaders, 8)
    assert found["per_step"] == 6 and found["bytes_per_step"] == 4 * 4096 + 2 * 8192 and found["depth"] == 8
    assert found["busy_share"] == pytest.approx(0.8)
    assert found["mean_under_way"] == pytest.approx((4 * 4 + 6 * 2 + 2 * 2) / 8)
    assert found["bytes_per_s"] == pytest.approx(found["bytes_per_step"] / 0.008)
    assert found["sizes"] == [
        {"up_to_bytes": 4096, "picked": 10, "picked_bytes": 40960, "in_order": 0, "in_order_bytes": 0},
        {"up_to_bytes": 1 << 20, "picked": 0, "picked_bytes": 0, "in_order": 4, "in_order_bytes": 16384},
    ]
    assert read_figures(step, [], 0)["bytes_per_s"] == 0.0


def test_a_wait_is_split_by_what_loaders_did_meanwhile() -> None:
    """Of a wait from 10 to 20 ms: a request until 18, whose two reads are handed in at 12 and back at 13 and 16."""
    engine = records((trace.STEP, 5, 25, -1, 0, 1, 0), (trace.WAIT, 1, 4, -1, 0, 0, 0), (trace.WAIT, 10, 20, -1, 0, 0, 0))
    one = loader(
        (trace.REQUEST, 2, 3, 0, 0, 4096, 1), (trace.SUBMIT, 2, 3, -1, 0, 1, 0), (trace.READ, 3, 3, -1, 0, 1, 0),  # for a prompt
        (trace.REQUEST, 8, 18, 0, 0, 8192, 2), (trace.SUBMIT, 12, 12.5, -1, 0, 2, 0), (trace.READ, 12.5, 13, -1, 0, 1, 0),
        (trace.READ, 14, 16, -1, 0, 1, 0),
    )  # fmt: skip
    found = read_figures(engine, [one], 2)
    assert found["wait_reading_ms"] == pytest.approx(4) and found["wait_asked_ms"] == pytest.approx(8)
    assert found["mean_under_way"] == pytest.approx((2 * 1 + 1 * 3) / 4)


def test_bytes_read_in_vain_count_for_the_disk() -> None:
    step = records((trace.STEP, 10, 20, -1, 0, 1, 0))
    one = loader((trace.REQUEST, 10, 15, 0, 0, 4096, 1), (trace.SUBMIT, 10, 10, -1, 0, 2, 0), (trace.READ, 10, 14, -1, 0, 2, 0))
    found = read_figures(step, [one], 2)
    assert found["bytes_per_step"] == 4096 and found["mean_bytes"] == 4096  # two reads of 4096 each for 4096 that were asked for
    assert found["bytes_per_s"] == pytest.approx(2 * 4096 / 0.004)


def test_steps_whose_reads_are_lost_do_not_count() -> None:
    steps = records((trace.STEP, 10, 20, -1, 0, 1, 0), (trace.STEP, 30, 40, -1, 1, 1, 0))
    kept = loader((trace.SUBMIT, 30, 30, -1, 0, 1, 0), (trace.READ, 30, 40, -1, 0, 1, 0))
    assert read_figures(steps, [kept], 1)["busy_share"] == pytest.approx(0.5)
    assert read_figures(steps, [replace(kept, lost=3)], 1)["busy_share"] == pytest.approx(1)


def test_the_working_set_is_the_union_over_windows() -> None:
    named = np.random.default_rng().random((13, 2, 50)) < 0.2
    found = working_set([0, 7], named)
    assert [(point["layer"], point["tokens"]) for point in found] == [(layer, k) for k in (1, 2, 4, 8) for layer in (0, 7)]
    for point in found:
        place, k = (0, 7).index(point["layer"]), point["tokens"]
        unions = [named[at : at + k, place].any(axis=0).mean() for at in range(13 - k + 1)]
        assert point["share"] == pytest.approx(np.mean(unions))
        new = [(named[at + k, place] & ~named[at : at + k, place].any(axis=0)).sum() for at in range(13 - k)]
        assert point["missed"] == pytest.approx(sum(new) / named[k:, place].sum())
    assert working_set([0], named[:4, :1])[-1]["missed"] is None  # no token came after four
    assert working_set([0], named[:0, :1]) == []
