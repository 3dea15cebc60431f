import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inflash.errors import RunError
from inflash.pipeline import result_writer
from inflash.pipeline.batch_results import failed_line
from inflash.pipeline.result_file import ResultFile, ResultStream
from inflash.pipeline.result_writer import MOST_WAITING, ResultWriter

WAIT_S = 20


class Failing:
    """A file of the operating system's that takes ten bytes and then fails, while its disk has a fault."""

    def __init__(self, file: Any, disk: "Disk") -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        self._disk.num_tries += 1
        if self._disk.fault is None:
            return self._file.write(data)
        self._file.write(data[:10])
        raise self._disk.fault


class Disk(ResultFile):
    """A result file on a disk that can be made to fail: the last step before the operating system is replaced, nothing of ours."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begin(resume=True)
        self.fault: OSError | None = None
        self.num_tries = 0
        self.synced: list[tuple[float, int]] = []
        self._file = Failing(self._file, self)  # pyright: ignore[reportAttributeAccessIssue]

    def sync(self) -> None:
        super().sync()
        self.synced.append((time.monotonic(), self._durable))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text(encoding="utf-8").splitlines()]


def line(custom_id: str) -> dict[str, Any]:
    return failed_line(custom_id, "x", "y")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_line_is_in_the_file_at_once_and_on_the_disk_within_a_second(path):
    disk = Disk(path)
    with ResultWriter(disk) as writer:
        began = time.monotonic()
        writer.write(line("a"))
        until(path.read_bytes)
        assert ids(path) == ["a"]
        assert not disk.synced  # not for every line: the disk would do nothing else
        until(lambda: bool(disk.synced))
        assert disk.synced[0][0] - began >= 0.5 * result_writer.SYNC_S
        assert disk.synced[0][1] == path.stat().st_size
    assert disk.num_waiting == 0


def test_answers_and_refusals_go_where_they_belong(path):
    errors = path.with_name("err.jsonl")
    with ResultWriter(Disk(path), Disk(errors)) as writer:
        for custom_id in "abcd":
            writer.write(line(custom_id), succeeded=custom_id in "ac")
    assert (ids(path), ids(errors)) == (["a", "c"], ["b", "d"])


def test_closing_puts_everything_on_the_disk_and_lets_others_have_the_file(path):
    disk = Disk(path)
    writer = ResultWriter(disk)
    writer.write(line("a"))
    writer.close()
    writer.close()
    assert disk.synced[-1][1] == path.stat().st_size
    ResultFile(path).close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_pauses_the_run_which_goes_on_when_there_is_room(path, code):
    disk, told = Disk(path), []
    with ResultWriter(disk, tell=told.append, first_retry_s=0.01) as writer:
        writer.write(line("a"))
        until(path.read_bytes)
        disk.fault = OSError(code, "It is full")
        writer.write(line("b"))
        until(lambda: not writer.ready)
        writer.write(line("c"))
        until(lambda: disk.num_tries > 3)
        assert not writer.wait_ready(0.01)
        assert ids(path) == ["a"]  # no part of a line is left for readers
        disk.fault = None
        assert writer.wait_ready(WAIT_S)
    assert ids(path) == ["a", "b", "c"]
    assert len(told) == 2
    assert f"result file {path} cannot be written: It is full; pausing" in told[0]
    assert "can be written again" in told[1]


def test_a_pause_has_an_end_and_what_was_written_is_kept(path, monkeypatch):
    monkeypatch.setattr(result_writer, "SYNC_S", 0.01)
    disk = Disk(path)
    writer = ResultWriter(disk, pause_limit_s=0.05, first_retry_s=0.01)
    writer.write(line("a"))
    until(lambda: bool(disk.synced))
    disk.fault = OSError(errno.ENOSPC, "It is full")
    writer.write(line("b"))
    until(lambda: not writer._thread.is_alive())
    for action in (lambda: writer.wait_ready(0), lambda: writer.write(line("c")), writer.close):
        with pytest.raises(RunError, match=r"cannot be written: It is full; finished results \(1\) may be lost, .*run again"):
            action()
    assert ids(path) == ["a"]


def test_who_hurries_does_not_wait_for_a_full_disk(path):
    disk = Disk(path)
    writer = ResultWriter(disk)
    disk.fault = OSError(errno.ENOSPC, "It is full")
    writer.write(line("a"))
    until(lambda: not writer.ready)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"finished results \(1\) may be lost"):
        writer.close(hurry=True)
    assert time.monotonic() - began < WAIT_S


@pytest.mark.parametrize(("kept", "advice"), [(True, "the others stay; make room and run again"), (False, "give -o a file")])
def test_whether_a_run_can_go_on_is_told_by_where_its_answers_are(path, kept, advice):
    """Whichever of the two files it was that could not be written."""
    full = Disk(path)
    full.fault = OSError(errno.ENOSPC, "It is full")
    read, write = os.pipe()
    pipe = ResultStream(write, "a pipe")
    answers = Disk(path.with_name("answers")) if kept else pipe
    try:
        writer = ResultWriter(answers, full)
        writer.write(line("a"), succeeded=False)
        until(lambda: not writer.ready)
        with pytest.raises(RunError, match=rf"{path.name} cannot be written: It is full; .*{advice}"):
            writer.close(hurry=True)
    finally:
        pipe.close()
        os.close(read)


def test_what_ended_a_run_is_not_hidden_by_a_full_disk(path):
    disk, told = Disk(path), []
    with pytest.raises(KeyError), ResultWriter(disk, tell=told.append) as writer:
        disk.fault = OSError(errno.ENOSPC, "It is full")
        writer.write(line("a"))
        raise KeyError
    assert "finished results (1) may be lost" in told[-1]


def test_a_slow_reader_makes_the_run_wait(path):
    """The thread hangs in a write, as on a pipe that nobody empties."""
    disk, go = Disk(path), threading.Event()
    disk.flush = go.wait  # pyright: ignore[reportAttributeAccessIssue]
    with ResultWriter(disk) as writer:
        writer.write(line("first"))
        until(lambda: not writer._queue)
        for number in range(MOST_WAITING):
            assert writer.ready
            writer.write(line(f"{number}"))
        assert not writer.ready
        del disk.flush
        go.set()
        assert writer.wait_ready(WAIT_S)
    assert len(ids(path)) == MOST_WAITING + 1


def test_a_reader_that_left_ends_the_run(path):
    disk = Disk(path)
    disk.fault = BrokenPipeError(errno.EPIPE, "Broken pipe")
    with pytest.raises(BrokenPipeError), ResultWriter(disk) as writer:
        writer.write(line("a"))
        until(lambda: not writer._thread.is_alive())
        writer.write(line("b"))


def test_who_hurries_does_not_wait_for_a_reader_that_stalls():
    read, write = os.pipe()
    try:
        writer = ResultWriter(ResultStream(write, "a pipe"))
        for number in range(2000):  # more than a pipe holds
            writer.write(line(str(number)))
        until(lambda: not writer.ready)
        began = time.monotonic()
        with pytest.raises(
            RunError,
            match=r"a pipe cannot be written: nobody reads it; finished results \(\d+\) may be lost, .*give -o a file",
        ):
            writer.close(hurry=True)
        assert time.monotonic() - began < WAIT_S
    finally:
        os.close(read)


def test_a_pipe_that_does_not_block_is_waited_for(tmp_path: Path):
    """As the other end may have made it: standard output is shared with whoever started the command."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    found = bytearray()

    def take() -> None:
        while part := os.read(read, 1000):
            found.extend(part)
            time.sleep(0.001)

    reader = threading.Thread(target=take)
    reader.start()
    with ResultWriter(ResultStream(write, "a pipe"), pause_limit_s=0) as writer:
        for number in range(1000):
            writer.write(line(str(number)))
    reader.join(WAIT_S)
    os.close(read)
    assert [json.loads(each)["custom_id"] for each in bytes(found).splitlines()] == [str(number) for number in range(1000)]
