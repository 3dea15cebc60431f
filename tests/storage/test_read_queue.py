"""Both queues of reads behind one contract, over a file of random bytes."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from inflash.errors import RunError
from inflash.storage import read_queue
from inflash.storage.read_plan import ReadPlan, plan_rows
from inflash.storage.read_queue import KernelQueue, ReadQueue, ThreadQueue, open_read_queue, read_rest

ROW_BYTES, PARTS, COUNT = 512, 2, 3000
STRIDE = ROW_BYTES * PARTS


def kernel_queue(depth: int) -> ReadQueue:
    try:
        return KernelQueue(depth)
    except OSError as error:
        pytest.skip(f"no asynchronous I/O here: {error}")


@pytest.fixture(params=[kernel_queue, ThreadQueue], ids=["kernel", "threads"])
def open_queue(request: pytest.FixtureRequest) -> Callable[[int], ReadQueue]:
    return request.param


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """A descriptor, and what the file holds: [COUNT, PARTS, ROW_BYTES]."""
    content = np.random.default_rng().integers(0, 256, (COUNT, PARTS, ROW_BYTES), np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    yield descriptor, content
    os.close(descriptor)


def planned(places: np.ndarray, rows: np.ndarray) -> ReadPlan:
    """Part p of the i-th place goes to rows[p, i]."""
    addresses = rows.ctypes.data + ROW_BYTES * np.arange(rows.shape[0] * rows.shape[1]).reshape(rows.shape[:2]).T
    return plan_rows(places * STRIDE, addresses.astype(np.uint64), ROW_BYTES)


@pytest.mark.parametrize("depth", [1, 3, 64])
def test_everything_arrives_once(open_queue, file, depth: int) -> None:
    descriptor, content = file
    places = np.sort(np.random.default_rng().choice(COUNT, 700, replace=False))
    rows = np.zeros((PARTS, len(places), ROW_BYTES), np.uint8)
    plan, queue = planned(places, rows), open_queue(depth)
    try:
        reads = queue.prepare(descriptor, plan, 5 << 32)
        begun, back = 0, []
        deadline = time.monotonic() + 30
        while len(back) < len(plan) and time.monotonic() < deadline:
            begun += queue.submit(reads, begun)
            assert queue.under_way == begun - len(back) <= depth
            tags, results = queue.reap(1, 1.0)
            np.testing.assert_array_equal(results, plan.lengths[tags - (5 << 32)])
            back += tags.tolist()
    finally:
        queue.close()
    assert sorted(back) == [(5 << 32) + read for read in range(len(plan))]
    np.testing.assert_array_equal(rows, content[places].transpose(1, 0, 2))


def test_waiting_ends_when_nothing_comes(open_queue) -> None:
    queue = open_queue(4)
    try:
        began = time.monotonic()
        tags, results = queue.reap(2, 0.05)
        assert (len(tags), len(results)) == (0, 0)
        assert time.monotonic() - began >= 0.04
    finally:
        queue.close()


def test_waiting_ends_when_a_read_is_back_or_somebody_calls(open_queue, file) -> None:
    descriptor, content = file
    rows, call = np.zeros((PARTS, 1, ROW_BYTES), np.uint8), os.eventfd(0, os.EFD_NONBLOCK)
    queue = open_queue(4)
    try:
        began = time.monotonic()
        assert len(queue.reap(2, 0.05, call)[0]) == 0
        assert 0.04 <= time.monotonic() - began < 20
        assert queue.submit(queue.prepare(descriptor, planned(np.array([7]), rows), 9), 0) == 1
        tags, deadline = [], time.monotonic() + 20
        while not tags and time.monotonic() < deadline:
            tags = queue.reap(4, 30.0, call)[0].tolist()  # there will never be four
        assert tags == [9] and queue.under_way == 0
        np.testing.assert_array_equal(rows[:, 0], content[7])
        os.eventfd_write(call, 1)
        assert len(queue.reap(1, 30.0, call)[0]) == 0
        assert time.monotonic() - began < 20
    finally:
        queue.close()
        os.close(call)


def test_errors_and_ends_of_files_come_as_results(open_queue, file, tmp_path: Path) -> None:
    descriptor, _ = file
    rows = np.zeros((PARTS, 1, ROW_BYTES), np.uint8)
    plan, queue = planned(np.array([COUNT - 1]), rows), open_queue(4)
    writing = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    try:
        os.truncate(tmp_path / "file", COUNT * STRIDE - 100)
        assert queue.submit(queue.prepare(descriptor, plan, 0), 0) == 1
        _, (result,) = queue.reap(1, 5.0)
        assert result == STRIDE - 100
        with pytest.raises(RunError, match=r"file: expected 1024 bytes at \d+, found the file's end"):
            read_rest(descriptor, plan, 0, int(result), "file")
        try:
            refused = queue.prepare(writing, plan, 0)
            queue.submit(refused, 0)
            _, (result,) = queue.reap(1, 5.0)
            assert result == -errno.EBADF
        except OSError as error:  # the kernel's queue refuses it at once
            assert error.errno == errno.EBADF
    finally:
        queue.close()
        os.close(writing)


@pytest.mark.parametrize("done", [0, 1, 511, 512, 513, 1023])
def test_a_read_that_was_cut_short_goes_on_where_it_stopped(file, done: int) -> None:
    descriptor, content = file
    rows = np.zeros((PARTS, 1, ROW_BYTES), np.uint8)
    read_rest(descriptor, planned(np.array([7]), rows), 0, done, "file")
    np.testing.assert_array_equal(rows.reshape(-1)[done:], content[7].reshape(-1)[done:])
    assert not rows.reshape(-1)[:done].any()


def test_threads_take_over_where_the_system_has_no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    buffered = open_read_queue(2, direct=False)
    assert isinstance(buffered, ThreadQueue)
    buffered.close()

    def refused(depth: int) -> ReadQueue:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(read_queue, "KernelQueue", refused)
    queue = open_read_queue(2, direct=True)
    assert isinstance(queue, ThreadQueue)
    queue.close()
