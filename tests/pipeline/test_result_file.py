import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from inflash.errors import InflashError
from inflash.pipeline.batch_results import failed_line, refused_line
from inflash.pipeline.result_file import ResultFile, ResultStream, open_results, replace_file


def line(custom_id: str, *, succeeded: bool = True) -> bytes:
    found = failed_line(custom_id, "x", "y")
    if succeeded:
        found |= {"response": {"status_code": 200}, "error": None}
    return json.dumps(found).encode() + b"\n"


def write(file: ResultFile | ResultStream, *lines: bytes) -> None:
    for each in lines:
        file.append(each)
    file.flush()


def opened(path: Path, *, resume: bool = True) -> ResultFile:
    file = ResultFile(path)
    try:
        file.begin(resume=resume)
    except BaseException:
        file.close()
        raise
    return file


def add(path: Path, *lines: bytes, resume: bool = True) -> None:
    file = opened(path, resume=resume)
    write(file, *lines)
    file.sync()
    file.close()


def results(path: Path) -> dict[str, bool]:
    file = ResultFile(path)
    try:
        return dict(file.results())
    finally:
        file.close()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.mark.parametrize("cut", [1, 5, 18, 60, -1])
def test_a_torn_last_line_is_repaired_and_its_request_is_not_finished(path, cut):
    add(path, line("a"))
    path.write_bytes(path.read_bytes() + line("b")[:-1][:cut])
    assert results(path) == {"a": True}
    add(path, line("c"))
    assert results(path) == {"a": True, "c": True}


@pytest.mark.parametrize("content", ["precious", '{"custom_id": "a"}\n', "1\n", "[]\n", '{"id": 5, "error": null}\n', "\x00\n"])
def test_a_file_of_something_else_is_left_as_it_is(path, content):
    path.write_text(content)
    with pytest.raises(InflashError, match="line 1 is no result of a batch run"):
        results(path)
    file = ResultFile(path)
    with pytest.raises(InflashError, match="line 1 is no result of a batch run"):
        file.drop_unsuccessful()
    file.close()
    assert path.read_text() == content


def test_a_torn_end_of_something_else_is_not_cut_off(path):
    path.write_text("precious")
    with pytest.raises(InflashError, match="no-resume"):
        opened(path)
    assert path.read_text() == "precious"
    opened(path, resume=False).close()
    assert path.read_bytes() == b""


def test_starting_afresh_overwrites_and_resuming_appends(path):
    add(path, line("a"))
    add(path, line("b"))
    assert list(results(path)) == ["a", "b"]
    add(path, line("c"), resume=False)
    assert list(results(path)) == ["c"]


def test_a_file_made_for_nothing_goes_again_and_another_stays(path):
    ResultFile(path).discard()
    assert not path.exists()
    add(path, line("a"))
    ResultFile(path).discard()
    assert results(path) == {"a": True}


def test_unsuccessful_lines_can_be_dropped_for_another_try(path):
    add(path, line("a"), line("b", succeeded=False), json.dumps(refused_line("c", "too long")).encode() + b"\n", line("d"))
    file = ResultFile(path)
    assert dict(file.results()) == {"a": True, "b": False, "c": False, "d": True}
    file.drop_unsuccessful()
    assert dict(file.results()) == {"a": True, "d": True}
    with pytest.raises(InflashError, match="being written by another run"):
        ResultFile(path)  # the new file is as locked as the old one was
    file.begin(resume=True)
    write(file, line("b"))
    file.close()
    assert list(results(path)) == ["a", "d", "b"]
    assert [entry.name for entry in path.parent.iterdir()] == ["out.jsonl"]


def test_two_runs_do_not_write_one_file(path):
    file = opened(path)
    write(file, line("a"))
    for _ in range(2):
        with pytest.raises(InflashError, match="being written by another run"):
            ResultFile(path)
    file.close()
    assert results(path) == {"a": True}


def test_a_lock_on_a_file_that_was_replaced_meanwhile_counts_for_nothing(path, monkeypatch):
    """Another run drops lines, and so renames another file into place, between our opening and our locking."""
    add(path, line("a"))
    real, calls = os.path.samestat, []

    def replaced_once(ours: os.stat_result, theirs: os.stat_result) -> bool:
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
            path.write_bytes(line("b"))
            return real(ours, path.stat())
        return real(ours, theirs)

    monkeypatch.setattr("os.path.samestat", replaced_once)
    file = ResultFile(path)
    assert (len(calls), dict(file.results())) == (2, {"b": True})
    file.begin(resume=True)
    write(file, line("c"))
    file.close()
    assert results(path) == {"b": True, "c": True}


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InflashError, match=r"none/out\.jsonl cannot be opened: No such file"):
        ResultFile(tmp_path / "none" / "out.jsonl")
    with pytest.raises(InflashError, match="cannot be opened: Is a directory"):
        open_results(tmp_path)


def test_when_the_disk_takes_no_more_the_file_ends_with_a_whole_line_and_goes_on_later(path):
    """A limit on the file's size stands for the full disk: the write comes back short, then fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file = opened(path)
    write(file, line("a"))
    whole = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, limits[1]))
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                write(file, line("b"))
            assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.num_waiting == 3
    write(file, line("c"))
    file.sync()
    assert file.num_waiting == 0
    file.close()
    assert results(path) == {"a": True, "b": True, "c": True}


def test_what_a_failed_sync_may_have_lost_is_written_again(path, monkeypatch):
    """After a failed fsync Linux forgets what it could not write, and the next fsync succeeds."""
    real = os.fsync

    def losing(descriptor: int) -> None:
        os.ftruncate(descriptor, synced)
        raise OSError(errno.EIO, "Input/output error")

    file = opened(path)
    write(file, line("a"))
    file.sync()
    synced = path.stat().st_size
    write(file, line("b"))
    monkeypatch.setattr("os.fsync", losing)
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    monkeypatch.setattr("os.fsync", real)
    write(file, line("c"))
    file.sync()
    file.close()
    assert list(results(path)) == ["a", "b", "c"]


def test_a_killed_run_loses_no_line_that_it_wrote(path):
    script = f"""
import os, signal
from inflash.pipeline.result_file import ResultFile
file = ResultFile({str(path)!r})
file.begin(resume=True)
for custom_id in "abcde":
    text = '{{"id": "batch_req_1", "custom_id": "%s", "response": {{"status_code": 200}}, "error": null}}' % custom_id
    file.append(text.encode() + bytes([10]))
    file.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert list(results(path)) == list("abcde")  # and the lock went with its process


def test_a_stream_gets_whole_lines_however_little_it_takes_at_a_time(monkeypatch):
    taken, real = bytearray(), os.write

    def write_little(descriptor: int, data: bytes) -> int:
        taken.extend(data[:7])
        return len(data[:7])

    stream = ResultStream(os.open(os.devnull, os.O_WRONLY), "a pipe")
    monkeypatch.setattr("os.write", write_little)
    lines = line("a"), line("b")
    write(stream, *lines)
    monkeypatch.setattr("os.write", real)
    assert bytes(taken) == b"".join(lines)
    stream.close()
    stream.close()


def test_what_is_no_file_is_written_as_a_stream():
    stream = open_results(Path(os.devnull))
    assert isinstance(stream, ResultStream)
    write(stream, line("a"))
    stream.close()


def test_a_file_that_is_replaced_stays_where_a_link_leads_and_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "out.jsonl", tmp_path / "out.jsonl"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    replace_file(link, [b"new"])
    assert link.is_symlink() and real.read_bytes() == b"new" and real.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in real.parent.iterdir()] == ["out.jsonl"]
