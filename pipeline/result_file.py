"""Where result lines go: a file that keeps whole lines whatever happens and that one run at a time may write, or a pipe."""

import errno
import fcntl
import json
import os
import select
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from ..errors import InflashError

LINE_START = b'{"id": "batch_req_'
STANDARD_OUTPUT = Path("-")
_LOOK_MS = 200  # how soon a stream that waits for its reader hears that it is to hurry
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class Results(Protocol):
    """Takes lines in order. After an `OSError` `flush` may be called again, and goes on where it was.

    Attributes:
      name: for messages.
      num_waiting: lines that are not known to be on the disk.
    """

    name: str

    @property
    def num_waiting(self) -> int: ...

    def append(self, line: bytes) -> None:
        """Keeps a line in memory."""

    def flush(self) -> None:
        """Hands every line to the operating system."""

    def sync(self) -> None:
        """Puts what was flushed on the disk."""

    def hurry(self) -> None:
        """Has `flush` raise an `OSError` from now on rather than wait for a reader. Called from another thread."""

    def close(self) -> None:
        """Lets others have it."""


class ResultFile:
    """A result file, locked from here until it is closed or the process ends.

    What the disk has not confirmed stays in memory, because a failed fsync loses what was written before it.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the file, and makes it if it is not there.

        Raises:
          InflashError: another run is writing it, or it cannot be written.
        """
        self.path = Path(path)
        self.name = f"result file {path}"
        self.made = not self.path.exists()
        self._file = _open_locked(self.path)
        self._durable = self._size = 0  # bytes on the disk; and of whole lines in the file
        self._lines: list[bytes] = []
        self._num_written = 0
        self._ends_whole = True

    @property
    def num_waiting(self) -> int:
        return len(self._lines)

    def results(self) -> Iterator[tuple[str, bool]]:
        """The requests that the file has a line for, and whether they succeeded.

        A last line that was being written when its run was killed does not count.

        Raises:
          InflashError: it holds something else than results.
        """
        for number, line in enumerate(_whole_lines(self.path), 1):
            yield _parse_result(self.path, number, line)

    def begin(self, *, resume: bool) -> None:
        """Makes the file ready for more lines.

        Args:
          resume: keep the lines that are there, less the beginning of one that a killed run left; False: start afresh.

        Raises:
          InflashError: it cannot be written, or (resuming) ends in something else than a result.
        """
        size = sum(map(len, _whole_lines(self.path))) if resume else 0
        try:
            self._file.truncate(size)
        except OSError as error:
            raise InflashError(f"{self.name} cannot be written: {error.strerror}; choose another output") from error
        self._durable = self._size = size

    def drop_unsuccessful(self) -> None:
        """Rewrites the file without its refused and failed lines, so that they can be tried again. Whole or not at all.

        Raises:
          InflashError: it holds something else than results, or there is no room.
        """
        lines = enumerate(_whole_lines(self.path), 1)
        replace_file(self.path, (line for number, line in lines if _parse_result(self.path, number, line)[1]))
        before, self._file = self._file, _open_locked(self.path)
        before.close()

    def append(self, line: bytes) -> None:
        self._lines.append(line)

    def flush(self) -> None:
        if not self._ends_whole:
            self._cut()
        while self._num_written < len(self._lines):
            line, written = self._lines[self._num_written], 0
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                self._go_back(self._size, self._num_written)
                raise
            self._size += len(line)
            self._num_written += 1

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError:
            self._go_back(self._durable, 0)
            raise
        self._durable = self._size
        del self._lines[: self._num_written]
        self._num_written = 0

    def hurry(self) -> None:
        """A disk has no readers to wait for."""

    def _go_back(self, size: int, num_written: int) -> None:
        self._size, self._num_written, self._ends_whole = size, num_written, False
        with suppress(OSError):  # now, so that readers find whole lines; else before the next line
            self._cut()

    def _cut(self) -> None:
        self._file.truncate(self._size)
        self._ends_whole = True

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        """Removes the file again if it was made here and has no line; then closes it."""
        if self.made and not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)
        self.close()


class ResultStream:
    """Standard output, or another place that can only be written to, line after line."""

    def __init__(self, descriptor: int, name: str) -> None:
        """Takes an open descriptor over."""
        self.name = name
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._rest, self._hurried = bytearray(), False
        self.num_waiting = 0

    def append(self, line: bytes) -> None:
        self._rest += line
        self.num_waiting += 1

    def flush(self) -> None:
        while self._rest:
            if not self._poll.poll(_LOOK_MS):
                if self._hurried:
                    raise OSError(errno.EAGAIN, "nobody reads it")
                continue
            with suppress(BlockingIOError):  # who has the other end may have it not block
                del self._rest[: os.write(self._descriptor, self._rest[: select.PIPE_BUF])]  # for so much there is room
        self.num_waiting = 0

    def sync(self) -> None:
        """There is nothing to wait for."""

    def hurry(self) -> None:
        self._hurried = True

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_results(path: Path) -> ResultFile | ResultStream:
    """What `--output-file` names: a file, standard output for `-`, or a pipe or device.

    Raises:
      InflashError: it cannot be written, or another run is writing it.
    """
    if path == STANDARD_OUTPUT:
        return ResultStream(os.dup(1), "standard output")
    try:
        if not path.exists() or stat.S_ISREG(path.stat().st_mode) or path.is_dir():
            return ResultFile(path)
        return ResultStream(os.open(path, os.O_WRONLY | os.O_CLOEXEC), f"output {path}")
    except OSError as error:
        raise InflashError(f"output {path} cannot be opened: {error.strerror}; choose another output") from error


def replace_file(path: Path, content: Iterable[bytes]) -> None:
    """Writes a file beside `path`, or what it links to, and renames it, so that a reader or a crash finds the old content or the new one.

    Raises:
      InflashError: if that is not possible.
    """
    path = path.resolve()
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with aside.open("wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InflashError(f"{path} cannot be written: {error.strerror}; make room or choose another place") from error


def _open_locked(path: Path) -> FileIO:
    """The file for appending, unbuffered, locked until it is closed or its process ends."""
    while True:
        try:
            file = path.open("ab", buffering=0)
        except OSError as error:
            raise InflashError(f"result file {path} cannot be opened: {error.strerror}; choose another output") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:  # a file system without locks
                return file
            file.close()
            raise InflashError(
                f"result file {path} is being written by another run; wait for it or choose another output"
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # replaced or removed between opening and locking


def _whole_lines(path: Path) -> Iterator[bytes]:
    """A result file's lines, without the beginning of one more that a killed run left."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield line
                elif line[: len(LINE_START)] != LINE_START[: len(line)]:
                    raise _no_result(path, number)
    except OSError as error:
        raise InflashError(f"result file {path} cannot be read: {error.strerror}") from error


def _parse_result(path: Path, number: int, line: bytes) -> tuple[str, bool]:
    try:
        document: Any = json.loads(line)
        response = document["response"]
        succeeded = document["error"] is None and response["status_code"] == 200
        custom_id = document["custom_id"]
    except (ValueError, TypeError, KeyError) as error:
        raise _no_result(path, number) from error
    if not isinstance(custom_id, str):
        raise _no_result(path, number)
    return custom_id, succeeded


def _no_result(path: Path, number: int) -> InflashError:
    return InflashError(
        f"result file {path}: line {number} is no result of a batch run, so it is left as it is; "
        "choose another output, or --no-resume to overwrite it"
    )
