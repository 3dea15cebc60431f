"""Writes result lines from a thread of its own, so that decoding never waits for the disk.

A line is handed to the operating system at once, where a kill cannot reach it, and is on the disk within a second. A disk that takes
nothing makes the run pause: it is tried again and again, while `ready` tells the run to begin nothing new.
"""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import RunError
from .result_file import ResultFile, Results

SYNC_S = 0.9
MOST_WAITING = 256
"""Lines that may wait for a slow reader before nothing new is begun."""

_FIRST_RETRY_S, _LAST_RETRY_S = 0.5, 30.0
_to_json = json.JSONEncoder(allow_nan=False).encode


class ResultWriter:
    """Takes result lines and sees to it that they are kept. A context manager; leaving it in peace waits until they are."""

    def __init__(
        self,
        results: Results,
        errors: Results | None = None,
        *,
        pause_limit_s: float = 3600.0,
        tell: Callable[[str], None] = lambda message: None,
        first_retry_s: float = _FIRST_RETRY_S,
    ) -> None:
        """Starts the thread.

        Args:
          results: where answers go; closed with this.
          errors: where refused and failed requests go; None: to the answers.
          pause_limit_s: give up when the disk has taken nothing for so long.
          tell: called from the thread, once when a pause begins and once when it ends.
          first_retry_s: between the first two tries; it doubles up to half a minute.
        """
        self._places = (results,) if errors is None else (results, errors)
        self._pause_limit_s, self._tell, self._first_retry_s = pause_limit_s, tell, first_retry_s
        self._changed = threading.Condition()
        self._queue: list[tuple[Results, bytes]] = []
        self._paused_since: float | None = None
        self._closing = self._hurried = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="result-writer", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether there is room for more results: False during a pause."""
        return self._paused_since is None and len(self._queue) < MOST_WAITING

    def wait_ready(self, timeout_s: float) -> bool:
        """Waits until there is room, at most so long.

        Raises:
          RunError: it was given up.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self._failure is not None, timeout_s)
        self._raise_failure()
        return self.ready

    def write(self, line: dict[str, Any], *, succeeded: bool = True) -> None:
        """Takes a result, and does not wait.

        Raises:
          RunError: it was given up.
          BrokenPipeError: nobody reads standard output any more.
        """
        self._raise_failure()
        data = _to_json(line).encode() + b"\n"
        with self._changed:
            self._queue.append((self._places[0 if succeeded else -1], data))
            self._changed.notify_all()

    def close(self, *, hurry: bool = False) -> None:
        """Writes what there is, and ends. May be called again.

        Args:
          hurry: do not wait for a disk or a reader that takes nothing.

        Raises:
          RunError, BrokenPipeError: as `write`.
        """
        for place in self._places if hurry else ():
            place.hurry()
        with self._changed:
            self._closing, self._hurried = True, self._hurried or hurry
            self._changed.notify_all()
        while self._thread.is_alive():  # in short waits, so that a signal is heard
            self._thread.join(0.2)
        self._raise_failure()

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, _: type[BaseException] | None, ended_by: BaseException | None, *__: object) -> None:
        try:
            self.close(hurry=ended_by is not None)
        except (OSError, RunError) as error:
            if ended_by is None:
                raise
            if str(error) != str(ended_by):
                self._tell(str(error))  # and what ended the run is told by its own exception

    def _raise_failure(self) -> None:
        if isinstance(self._failure, BrokenPipeError):
            raise self._failure
        if self._failure is not None:
            reason = getattr(self._failure, "strerror", None) or repr(self._failure)
            place = next((place for place in self._places if place.num_waiting), self._places[0])
            lost = sum(place.num_waiting for place in self._places)
            others = "the others stay; make room and run again to go on"
            if not isinstance(self._places[0], ResultFile):
                others = "and nothing can go on from here: give -o a file to keep results in"
            raise RunError(
                f"{place.name} cannot be written: {reason}; finished results ({lost}) may be lost, {others}"
            ) from self._failure

    def _work(self) -> None:
        try:
            self._write_all()
        except Exception as error:  # whatever it is, who waits for this thread must hear of it
            self._failure = error
        finally:
            for place in self._places:
                place.close()
            with self._changed:
                self._changed.notify_all()

    def _write_all(self) -> None:
        unsynced_since: float | None = None
        while True:
            with self._changed:
                due = None if unsynced_since is None else max(unsynced_since + SYNC_S - time.monotonic(), 0)
                self._changed.wait_for(lambda: self._queue or self._closing, due)
                taken, self._queue = self._queue, []
                ending = self._closing
                self._changed.notify_all()
            for place, data in taken:
                place.append(data)
            if taken and unsynced_since is None:
                unsynced_since = time.monotonic()
            sync = unsynced_since is not None and (ending or time.monotonic() >= unsynced_since + SYNC_S)
            self._persist(sync=sync)
            unsynced_since = None if sync else unsynced_since
            if ending:
                return

    def _persist(self, *, sync: bool) -> None:
        """Writes until the disk takes it, or until that has lasted too long."""
        retry_s = self._first_retry_s
        while True:
            place = self._places[0]
            try:
                for place in self._places:
                    place.flush()
                if sync or self._paused_since is not None:
                    for place in self._places:
                        place.sync()
            except BrokenPipeError:
                raise
            except OSError as error:
                self._pause(place, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._hurried, retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)
                continue
            if self._paused_since is not None:
                self._tell(f"{place.name} can be written again after {time.monotonic() - self._paused_since:.0f} s: going on")
                with self._changed:
                    self._paused_since = None
                    self._changed.notify_all()
            return

    def _pause(self, place: Results, error: OSError) -> None:
        now = time.monotonic()
        if self._hurried or (self._paused_since is not None and now - self._paused_since >= self._pause_limit_s):
            raise error
        if self._paused_since is None:
            self._paused_since = now
            self._tell(
                f"{place.name} cannot be written: {error.strerror}; pausing until it can, {self._pause_limit_s:.0f} s at most, "
                "make room on the disk"
            )
