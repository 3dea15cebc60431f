"""In which order a loader's reads begin: what somebody waits for, guesses, and what streams by."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflash.pipeline import read_schedule
from inflash.pipeline.read_schedule import ReadSchedule, Request, first_tag
from inflash.storage.read_plan import ReadPlan, plan_bytes
from inflash.storage.read_queue import PreparedReads
from inflash.storage.readers import DirectFile

SIZE = 1 << 20


class ListedQueue:
    """Begins reads by listing them, and has back what it is told to."""

    def __init__(self, depth: int) -> None:
        self.depth, self.under_way, self.begun = depth, 0, list[int]()

    def prepare(self, descriptor: int, plan: ReadPlan, tag: int) -> PreparedReads:
        return PreparedReads(descriptor=descriptor, plan=plan, tag=tag)

    def submit(self, reads: PreparedReads, first: int, most: int | None = None) -> int:
        count = max(0, min(len(reads.plan) - first, self.depth - self.under_way, self.depth if most is None else most))
        self.begun += range(reads.tag + first, reads.tag + first + count)
        self.under_way += count
        return count

    def reap(self, least: int, timeout_s: float, until: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        self.under_way -= least
        back, self.begun = self.begun[:least], self.begun[least:]
        return np.array(back), np.full(least, SIZE)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> DirectFile:
    """One for all requests: a loader's files stay open as long as it lives."""
    path = tmp_path_factory.mktemp("read") / "file"
    path.touch()
    return DirectFile(path)


def request(
    file: DirectFile, queue: ListedQueue, number: int, reads: int, *, ahead: bool = False, in_order: bool = False
) -> Request:
    prepared = queue.prepare(0, plan_bytes(0, reads * SIZE, 0), first_tag(number))
    return Request(number, prepared, file, 0, lambda: None, ahead=ahead, in_order=in_order)


def numbers(queue: ListedQueue) -> list[int]:
    """Of the requests whose reads are under way, in the order in which they began."""
    return [tag // first_tag(1) for tag in queue.begun]


def test_requests_may_have_any_number(file: DirectFile) -> None:
    """After weeks of a small model there are more than a tag has room for."""
    queue, many = ListedQueue(16), (1 << 31) - 1
    schedule = ReadSchedule(queue)
    for number in range(many, many + 3):
        schedule.add(request(file, queue, number, 2))
    schedule.begin(many + 2)
    assert [done.number for done in schedule.take_back(*queue.reap(6, 0))] == [many + 1, many + 2, many]
    assert not schedule


def test_neurons_do_not_stand_behind_what_streams_by(file: DirectFile) -> None:
    queue = ListedQueue(16)
    schedule = ReadSchedule(queue)
    schedule.add(request(file, queue, 1, 32, in_order=True))
    schedule.add(request(file, queue, 2, 3))
    schedule.begin()
    assert numbers(queue) == [2, 2, 2, 1, 1]
    assert schedule.worth_waiting_for() == 3
    assert [done.number for done in schedule.take_back(*queue.reap(3, 0))] == [2]
    schedule.begin()
    assert numbers(queue) == [1, 1]  # neurons may be asked for any moment
    schedule.add(request(file, queue, 3, 1))
    schedule.begin()
    assert numbers(queue) == [1, 1, 3]


def test_between_neurons_there_is_only_what_streams_by(file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = ListedQueue(16)
    schedule = ReadSchedule(queue)
    schedule.add(request(file, queue, 1, 32, in_order=True))
    assert not schedule.between_neurons  # none have been asked for yet
    schedule.add(request(file, queue, 2, 3))
    schedule.begin()
    assert not schedule.between_neurons
    schedule.take_back(*queue.reap(3, 0))
    assert schedule.between_neurons
    monkeypatch.setattr(read_schedule, "_QUIET_NS", 0)
    assert not schedule.between_neurons


def test_a_stretch_that_the_engine_waits_for_has_the_whole_queue(file: DirectFile) -> None:
    queue = ListedQueue(16)
    schedule = ReadSchedule(queue)
    schedule.add(request(file, queue, 1, 3))
    schedule.add(request(file, queue, 2, 5, in_order=True))
    schedule.add(request(file, queue, 3, 5, in_order=True))
    schedule.begin(awaited=1)
    assert numbers(queue) == [1, 1, 1, 2, 2]
    schedule.begin(awaited=2)
    assert numbers(queue) == [1, 1, 1, 2, 2, 2, 2, 2]  # but not the one behind it
    schedule.take_back(*queue.reap(8, 0))
    schedule.begin(awaited=2)
    assert numbers(queue) == [3, 3]


def test_guesses_stand_back_behind_what_somebody_waits_for_and_before_what_streams_by(file: DirectFile) -> None:
    queue = ListedQueue(16)
    schedule = ReadSchedule(queue)
    schedule.add(request(file, queue, 1, 2, in_order=True))
    schedule.add(request(file, queue, 2, 4, ahead=True))
    schedule.add(request(file, queue, 3, 3))
    schedule.begin()
    assert numbers(queue) == [3, 3, 3, 1, 1]
    schedule.take_back(*queue.reap(3, 0))
    schedule.begin()
    assert numbers(queue) == [1, 1, 2, 2, 2, 2]


def test_where_no_neurons_are_asked_for_a_stream_has_the_whole_queue(file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = ListedQueue(16)
    schedule = ReadSchedule(queue)
    schedule.add(request(file, queue, 1, 12, in_order=True))
    schedule.add(request(file, queue, 2, 12, in_order=True))
    schedule.begin()
    assert numbers(queue) == [1] * 12 + [2] * 4
    assert schedule.worth_waiting_for() == 8
    monkeypatch.setattr(read_schedule, "_QUIET_NS", 0)
    schedule.take_back(*queue.reap(12, 0))
    schedule.add(request(file, queue, 3, 1))  # long ago
    schedule.begin()
    assert sorted(numbers(queue)) == [2] * 12 + [3]


@given(
    kinds=st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["needed", "ahead", "in order"])), min_size=1, max_size=12),
    depth=st.integers(1, 8),
    together=st.integers(1, 5),
)
def test_every_read_begins_once_and_every_request_is_finished(
    file: DirectFile, kinds: list[tuple[int, str]], depth: int, together: int
) -> None:
    queue = ListedQueue(depth)
    schedule, finished, read = ReadSchedule(queue), list[int](), 0
    waiting = [
        request(file, queue, number, reads, ahead=kind == "ahead", in_order=kind == "in order")
        for number, (reads, kind) in enumerate(kinds, 1)
    ]
    while schedule or waiting:
        for each in waiting[:together]:
            schedule.add(each)
        del waiting[:together]
        schedule.begin()
        assert 1 <= queue.under_way <= depth
        read += (least := min(schedule.worth_waiting_for(), queue.under_way))
        done = schedule.take_back(*queue.reap(least, 0))
        assert all((each.results == SIZE).all() for each in done)
        finished += [each.number for each in done]
    assert sorted(finished) == list(range(1, len(kinds) + 1))
    assert read == sum(reads for reads, _ in kinds)
