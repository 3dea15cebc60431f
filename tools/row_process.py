"""A row of a bench: a process of its own that tells what it does in lines of JSON. `row_result` is the other side.

Lines are `{"step": ...}` whenever something is done, what the bench asks for by name, and last `{"result": ...}` or `{"error": "..."}`.
"""

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import InflashError
from ..pipeline.interpreter import module_command, module_environment
from .memory_group import MemoryGroup

ALLOWANCE_BYTES = 64 << 20
"""That a row's memory cgroup may hold beyond what the row is planned for."""

_PATIENCE_S = 1800.0  # no prompt, and no turn of steps, takes so long
_LEAVE_S = 10.0
_KILLED = (-9, 137)


class RowProcess:
    """A row that runs. It ends with `close` at the latest.

    Attributes:
      group: the memory cgroup that it runs in; None where there is none.
    """

    def __init__(self, command: Sequence[str], group: MemoryGroup | None = None) -> None:
        self.group = group
        whole = group.wrap(command) if group else list(command)
        self._process = subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=module_environment())
        self._unread, self._leaving = b"", False

    def tell(self, line: str) -> None:
        """Sends a line; how it ended, should it have, `answer` says."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def end_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def answer(self, name: str, on_step: Callable[[], object] = lambda: None) -> Any:
        """What the row tells by this name next.

        Raises:
          InflashError: it tells of an error, ends instead, or says nothing at all for half an hour.
        """
        while "step" in (document := json.loads(self._line())):
            on_step()
        self._leaving = name == "result" or name not in document
        if name not in document:
            raise InflashError(document["error"])
        return document[name]

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + _PATIENCE_S
        while b"\n" not in self._unread:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise InflashError(f"said nothing for {_PATIENCE_S:.0f} s and was ended")
            part = os.read(descriptor, 1 << 16)
            if not part:
                raise InflashError(self._ended())
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self) -> str:
        try:
            code = self._process.wait(timeout=_LEAVE_S)
        except subprocess.TimeoutExpired:
            return "said nothing more and was ended"
        return "ended by the kernel for its memory" if code in _KILLED else f"ended with {code}"

    def memory(self) -> dict[str, Any]:
        """`peak_bytes` so far, None where nobody knows, and whether memory was `limited`."""
        return {"peak_bytes": self.group.peak_bytes() if self.group else None, "limited": self.group is not None}

    def close(self) -> None:
        """Waits until the row has left, if it is about to, or ends it."""
        self.end_input()
        for patience in (_LEAVE_S if self._leaving else 0.0, _LEAVE_S):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=patience)
                break
            self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def running_row(module: str, config: dict[str, Any], group: MemoryGroup | None) -> Iterator[RowProcess]:
    """A row that runs `module` of this folder, with a file of its settings as the argument."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        row = RowProcess(module_command(f"tools.{module}", file.name), group)
        try:
            yield row
        finally:
            row.close()
