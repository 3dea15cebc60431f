"""The input of a batch run: OpenAI's Batch JSONL, checked whole before the first token is generated.

Only where each line lies is kept, 36 bytes a request; the requests themselves are read again when their turn comes.
"""

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from ..errors import InflashError, RunError
from .batch_json import parse_object, shown
from .batch_requests import LINE_FIELDS, BatchRequest, parse_request
from .sampling_params import SamplingParams

SHOWN_PROBLEMS = 20
MOST_LINE_BYTES = 4 << 20
STANDARD_INPUT = Path("-")


class BatchFileError(InflashError):
    """A batch file with faults.

    Attributes:
      problems: (line number, what is wrong), the first 20; (None, ...) for a fault of no line.
    """

    def __init__(self, message: str, problems: list[tuple[int | None, str]]) -> None:
        super().__init__(message)
        self.problems = problems


class BatchFile:
    """A batch file without a fault; a context manager that holds it open.

    Attributes:
      path: where it lies; `-` for standard input.
      sha256: of its bytes, hexadecimal.
      url: the endpoint that all of its requests name.
    """

    def __init__(self, path: Path, file: BinaryIO, defaults: tuple[Mapping[str, Any], Mapping[str, Any]]) -> None:
        """Made by `read_batch`."""
        self.path, self.sha256, self.url = path, "", ""
        self._file, self._defaults = file, defaults
        self._offsets, self._numbers = array("Q"), array("I")
        self._digests = np.empty((0, 2), np.uint64)
        self._order = np.empty(0, np.int64)
        self._version = _version(file)

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[BatchRequest]:
        return map(self.request, range(len(self)))

    def request(self, index: int) -> BatchRequest:
        """The request at a place in the file, from 0; blank lines do not count.

        Raises:
          RunError: the file was changed since it was checked.
        """
        if _version(self._file) != self._version:
            raise RunError(f"batch file {self.path} was changed while it was being run; finished results are kept")
        self._file.seek(self._offsets[index])
        line = self._file.readline()
        return parse_request(parse_object(line), self._numbers[index], *self._defaults)

    def num_bytes(self, index: int) -> int:
        """Of a request's line, blank ones behind it counted."""
        return (self._offsets[index + 1] if index + 1 < len(self) else self._version[0]) - self._offsets[index]

    def index_of(self, custom_id: str) -> int | None:
        """The place of a request, or None if the file has no such request."""
        digest = _digest(custom_id)
        first = int(np.searchsorted(self._digests[:, 0], digest[0]))
        while first < len(self) and self._digests[first, 0] == digest[0]:
            if self._digests[first, 1] == digest[1]:
                return int(self._order[first])
            first += 1
        return None

    def close(self) -> None:
        """Closes the file. Idempotent."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, on_bytes: Callable[[int], object]) -> None:
        """Checks every line.

        Raises:
          BatchFileError: some are bad, or there are none.
        """
        digest, words = hashlib.sha256(), array("Q")
        problems: list[tuple[int | None, str]] = []
        bad_lines, offset, first_line = array("Q"), 0, 0
        for number, (pieces, num_bytes) in enumerate(_lines(self._file, digest.update), 1):
            start, offset = offset, offset + num_bytes
            on_bytes(num_bytes)
            if number == 1 and pieces.startswith(b"\xef\xbb\xbf"):
                pieces, start = pieces[3:], 3
            if not pieces.strip():
                continue
            try:
                if num_bytes > MOST_LINE_BYTES:
                    raise InflashError(f"{num_bytes} bytes long; a line may have {MOST_LINE_BYTES}")
                request = parse_request(parse_object(pieces), number, *self._defaults)
                self.url, first_line = self.url or request.url, first_line or number
                if request.url != self.url:
                    raise InflashError(f"url is '{request.url}', that of line {first_line} is '{self.url}'; make a file of each")
                self._offsets.append(start)
                self._numbers.append(number)
                words.extend(_digest(request.custom_id))
            except InflashError as error:
                bad_lines.append(number)
                problems += [(number, str(error))] if len(problems) < SHOWN_PROBLEMS else []
        self.sha256 = digest.hexdigest()
        repeated, repeated_lines = self._sort(np.frombuffer(words, np.uint64).reshape(-1, 2))
        problems = sorted(problems + repeated, key=lambda problem: problem[0] or 0)[:SHOWN_PROBLEMS]
        if problems:
            raise BatchFileError(_report(self.path, problems, sorted([*bad_lines, *repeated_lines])), problems)
        if not len(self):
            message = f"batch file {self.path} is empty; expected one JSON object a line, with {', '.join(LINE_FIELDS)}"
            raise BatchFileError(message, [(None, message)])

    def _sort(self, digests: np.ndarray) -> tuple[list[tuple[int | None, str]], list[int]]:
        """Prepares `index_of`; returns the first problems with repeated custom_ids, and the lines of all."""
        self._order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
        self._digests = digests[self._order]
        same = np.zeros(len(digests), bool)
        same[1:] = np.all(self._digests[1:] == self._digests[:-1], axis=1)
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))
        places = sorted(zip(self._order[same].tolist(), self._order[first[same]].tolist(), strict=True))
        problems: list[tuple[int | None, str]] = []
        for place, earlier in places[:SHOWN_PROBLEMS]:
            request = self.request(place)
            line = self._numbers[earlier]
            problems.append(
                (request.line, f"custom_id {shown(request.custom_id)} is already that of line {line}; make it unique")
            )
        return problems, [self._numbers[place] for place, _ in places]


def read_batch(
    path: str | Path,
    *,
    command_line: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> BatchFile:
    """Reads and checks every line of a batch file.

    Args:
      path: the file, UTF-8; `-` for standard input, which is kept in a temporary file, as a pipe is.
      command_line: `SamplingParams` fields for requests that do not give them.
      generation_config: the model's defaults for what neither gives.
      on_bytes: told how many bytes have been checked.

    Raises:
      BatchFileError: one that lists the bad lines (the first 20 and their number).
      InflashError: the file cannot be read.
    """
    path = Path(path)
    SamplingParams.from_defaults(generation_config or {})  # a fault of the model's file is no line's fault
    try:
        batch = BatchFile(path, _open_input(path), (command_line or {}, generation_config or {}))
        try:
            batch.read(on_bytes)
        except BaseException:
            batch.close()
            raise
    except OSError as error:
        raise InflashError(f"batch file {path} cannot be read: {error.strerror}") from error
    return batch


def _open_input(path: Path) -> BinaryIO:
    file = os.fdopen(os.dup(sys.stdin.fileno()), "rb") if path == STANDARD_INPUT else path.open("rb")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.tell() == 0:
        return file
    with file:
        spool = tempfile.TemporaryFile(prefix="inflash-batch-")  # noqa: SIM115 - who reads it closes it
        try:
            shutil.copyfileobj(file, spool, 1 << 20)
            spool.seek(0)
        except BaseException:
            spool.close()
            raise
    return spool  # pyright: ignore[reportReturnType]


def _lines(file: BinaryIO, on_piece: Callable[[bytes], None]) -> Iterator[tuple[bytes, int]]:
    """Each line and its length; of one that is too long only the beginning, which is all that is held."""
    while line := file.readline(MOST_LINE_BYTES + 1):
        on_piece(line)
        num_bytes, piece = len(line), line
        while not piece.endswith(b"\n") and (piece := file.readline(MOST_LINE_BYTES)):
            on_piece(piece)
            num_bytes += len(piece)
        yield line, num_bytes


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _digest(custom_id: str) -> tuple[int, int]:
    """128 bits that stand for it: no two ids have the same."""
    words = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    return int.from_bytes(words[:8], "little"), int.from_bytes(words[8:], "little")


def _report(path: Path, problems: list[tuple[int | None, str]], bad_lines: list[int]) -> str:
    count = f"{len(bad_lines)} bad line{'s' if len(bad_lines) > 1 else ''}"
    lines = [f"line {number}: {problem}" for number, problem in problems]
    told = {number for number, _ in problems}
    rest = [number for number in bad_lines if number not in told]
    more = [f"... and {len(rest)} more, line{'s' if len(rest) > 1 else ''} {_ranges(rest)}"] if rest else []
    return "\n  ".join([f"batch file {path}: {count}, so nothing was run; correct and start again", *lines, *more])


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers, those that follow each other as a range."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
