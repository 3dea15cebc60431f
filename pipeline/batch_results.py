"""The output of a batch run: result lines of OpenAI's Batch JSONL, written so that a killed run loses none of them."""

import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import InflashError
from .outputs import CompletionOutput, Logprob, RequestOutput

LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM writes this
SYNC_SECONDS = 1.0
LINE_START = b'{"id": "batch_req_'


def success_line(custom_id: str, output: RequestOutput, model: str, created: int) -> dict[str, Any]:
    """The result of a request that ran.

    Args:
      custom_id: the request's own name.
      output: what the engine gave back.
      model: the name to report.
      created: Unix time in seconds.
    """
    completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    body = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(completion) for completion in output.outputs],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": completion_tokens,
            "total_tokens": len(output.prompt_token_ids) + completion_tokens,
        },
    }
    return _line(custom_id, {"status_code": 200, "request_id": f"req_{uuid.uuid4().hex}", "body": body}, None)


def refused_line(custom_id: str, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The result of a request that cannot be run as it is (status 400).

    Args:
      custom_id: the request's own name.
      message: what is wrong with it.
      param: the field at fault.
      code: OpenAI's word for the fault, such as "context_length_exceeded".
    """
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    response = {"status_code": 400, "request_id": f"req_{uuid.uuid4().hex}", "body": {"error": error}}
    return _line(custom_id, response, None)


def failed_line(custom_id: str, code: str, message: str) -> dict[str, Any]:
    """The result of a request that failed through no fault of its own."""
    return _line(custom_id, None, {"code": code, "message": message})


def finished_ids(path: str | Path) -> dict[str, bool]:
    """The requests that a result file has a line for; True where it succeeded.

    A last line that was being written when its run was killed does not count. A file that is not there has none.

    Raises:
      InflashError: for a file that holds something else than results.
    """
    path = Path(path)
    if not path.exists():
        return {}
    return dict(_parse_result(path, number, line) for number, line in enumerate(_whole_lines(path), 1))


def drop_unsuccessful(path: str | Path) -> None:
    """Rewrites a result file without its refused and failed lines, so that they can be tried again. Whole or not at all.

    Raises:
      InflashError: for a file that another run is writing, or that holds something else than results.
    """
    path = Path(path)
    if path.exists():
        with _open_locked(path):
            lines = enumerate(_whole_lines(path), 1)
            replace_file(path, (line for number, line in lines if _parse_result(path, number, line)[1]))


def replace_file(path: Path, content: Iterable[bytes]) -> None:
    """Writes a file beside `path` and renames it, so that a reader or a crash finds the old content or the new one.

    Raises:
      InflashError: if that is not possible.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with aside.open("wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InflashError(f"{path} cannot be written: {error.strerror}; make room or choose another place") from error


class ResultWriter:
    """Appends result lines to a file that no other run is writing; a context manager.

    A line is handed to the operating system at once, so that it survives a kill, and to the disk at most a second's worth later.
    """

    def __init__(self, path: str | Path, *, resume: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens the file, which a run does when it is about to start.

        Args:
          path: the result file; made if it is not there.
          resume: keep the lines that are there, less the beginning of one that a killed run left; False: start afresh.
          clock: seconds.

        Raises:
          InflashError: for a file that another run is writing, that cannot be written, or (resuming) that ends in something
            else than a result.
        """
        self._path = Path(path)
        self._clock = clock
        self._synced_at = clock()
        self._file = _open_locked(self._path)
        try:
            self._size = sum(map(len, _whole_lines(self._path))) if resume else 0
            self._attempt(lambda: self._file.truncate(self._size))
        except InflashError:
            self._file.close()
            raise

    def write(self, line: dict[str, Any]) -> None:
        """Appends one result.

        Raises:
          InflashError: if the disk does not take it; the file then ends with the line before.
        """
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        self._attempt(lambda: self._append(data))
        if self._clock() - self._synced_at >= SYNC_SECONDS:
            self._attempt(self._sync)

    def close(self) -> None:
        """Puts everything on the disk and lets other runs have the file. May be called again."""
        if not self._file.closed:
            try:
                self._attempt(self._sync)
            finally:
                self._file.close()

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(data)

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced_at = self._clock()

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            raise InflashError(
                f"result file {self._path} cannot be written: {error.strerror}; finished results stay in it, run again to go on"
            ) from error


def _open_locked(path: Path) -> FileIO:
    """The file for appending, unbuffered, locked until it is closed or its process ends."""
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise InflashError(f"result file {path} cannot be opened: {error.strerror}; choose another output") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
            return file
        file.close()
        raise InflashError(f"result file {path} is being written by another run; wait for it or choose another output") from error
    return file


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}


def _choice(completion: CompletionOutput) -> dict[str, Any]:
    logprobs = None if completion.logprobs is None else _logprobs(completion.token_ids, completion.logprobs)
    return {
        "index": completion.index,
        "text": completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


def _logprobs(token_ids: list[int], places: list[dict[int, Logprob]]) -> dict[str, list[Any]]:
    """OpenAI's form for completions; offsets count characters of the text."""
    tokens, values, top, offsets, offset = [], [], [], [], 0
    for token_id, place in zip(token_ids, places, strict=True):
        chosen = place[token_id]
        tokens.append(_token_text(token_id, chosen))
        values.append(max(chosen.logprob, LEAST_LOGPROB))
        best_last = sorted(place.items(), key=lambda item: item[1].logprob)  # where two have one text, the better stays
        top.append({_token_text(token, entry): max(entry.logprob, LEAST_LOGPROB) for token, entry in best_last})
        offsets.append(offset)
        offset += len(chosen.decoded_token or "")
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _token_text(token_id: int, entry: Logprob) -> str:
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


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
        document = json.loads(line)
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
