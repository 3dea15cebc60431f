"""The cost model's disk: nothing is served twice, and neurons go before what streams by."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflash.pipeline.paper_disk import PaperDisk, PaperStream


def test_items_come_one_after_the_other() -> None:
    disk = PaperDisk(before_neurons_s=1.0)
    stream = PaperStream(disk, [2.0, 3.0], num_buffers=2)
    assert stream.take(0.0) == 2.0
    stream.ask(2.5)
    assert stream.take(2.5) == 5.0
    assert stream.take(9.0) == 9.0  # there since 7
    assert disk.busy_s == 7.0


def test_neurons_wait_for_the_reads_under_way_and_the_stream_for_neurons() -> None:
    disk = PaperDisk(before_neurons_s=1.0)
    item = disk.ask_item(0.0, 10.0)
    assert disk.ask_neurons(4.0, 2.0) == 7.0  # behind one second of the stream's
    assert disk.ask_neurons(5.0, 1.0) == 8.0  # behind other neurons, and they only
    assert disk.arrival(8.0, item) == pytest.approx(13.0)
    assert disk.ask_neurons(20.0, 2.0) == 22.0  # nothing streams by


@given(
    items=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=6),
    neurons=st.lists(st.tuples(st.floats(0.0, 2.0), st.floats(0.01, 2.0)), max_size=8),
    before=st.floats(0.0, 1.0),
)
def test_no_time_is_lost_while_there_is_something_to_read(
    items: list[float], neurons: list[tuple[float, float]], before: float
) -> None:
    disk, now = PaperDisk(before), 0.0
    asked = [disk.ask_item(0.0, seconds) for seconds in items]
    for later, seconds in neurons:
        now += later
        last = disk.arrival(now, asked[-1])
        there = disk.ask_neurons(now, seconds)
        assert there >= now + seconds
        now = max(now, there)
        # The stream loses the time that neurons take, but what was under way before them.
        assert disk.arrival(now, asked[-1]) <= max(last + seconds, now) + 1e-9
    arrivals = [disk.arrival(now, item) for item in asked]
    assert arrivals == sorted(arrivals)
    assert disk.busy_s == pytest.approx(sum(items) + sum(seconds for _, seconds in neurons))
