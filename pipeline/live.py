"""What a running engine tells about itself all the time: one page of counters, written once a step, that others find by process id.

The page is a memfd. It has no name in the file system, so nothing is left behind; another process of the same user finds it among the
engine's open files in /proc. What the loaders count lies in the slab, and the page says where.
"""

import json
import mmap
import os
import struct
import time
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import InflashError
from ..storage.store import Store
from .channel import COUNTERS
from .options import EngineOptions
from .plan import CACHED, Plan
from .step_times import StepTimes

_PAGE = 4096
_NAME, _SLAB_NAME = "inflash-live", "inflash-slab"
_TIMES = tuple(field.name for field in fields(StepTimes))
_values_of = attrgetter(*_TIMES)
_numbers = struct.Struct(f"<{len(_TIMES)}q")
_sequence = struct.Struct("<q")
_WRITING_S = 0.1  # writing a page takes microseconds: who takes longer was ended meanwhile
_ABOUT_AT, _ABOUT_BYTES = 1024, _PAGE - 1024


def about_run(store: Store, options: EngineOptions, plan: Plan, *, native: bool) -> dict[str, Any]:
    """What others may want to know of an engine, in JSON's types: `cache_share` is None where nothing is cached."""
    cached = plan.layers(CACHED)
    return {
        "model": str(store.path),
        "predictor": plan.predictor,
        "prefetch": plan.prefetch,
        "kernels": "native" if native else "xla",
        "queue_depth": plan.queue_depth,
        "cache_share": sum(plan.slots[layer] for layer in cached) / (len(cached) * store.config.d_ff) if cached else None,
        "options": asdict(options),
    }


class LivePage:
    """The engine's side."""

    def __init__(self, about: dict[str, Any], slab_descriptor: int, loaders: list[tuple[int, int]]) -> None:
        """Makes the page.

        Args:
          about: what readers may want to know that does not change, in JSON's types.
          slab_descriptor: of this process, as it may have several engines.
          loaders: process id of each, and where its counters lie in the slab.
        """
        needed = {"version": __version__, "pid": os.getpid(), "started_s": time.time(), "slab": slab_descriptor}
        needed["loaders"] = loaders[:64]
        text = json.dumps({**needed, **about}).encode()
        if len(text) > _ABOUT_BYTES:  # a store's path may be long; readers can do without it
            text = json.dumps(needed).encode()
        self._descriptor = os.memfd_create(_NAME)
        os.ftruncate(self._descriptor, _PAGE)
        self._page = mmap.mmap(self._descriptor, _PAGE)
        self._page[_ABOUT_AT : _ABOUT_AT + len(text)] = text
        self._count = 0
        self.update(StepTimes())

    def update(self, times: StepTimes) -> None:
        """Shows the totals of now. The number before them is odd while they change."""
        self._count += 2
        _sequence.pack_into(self._page, 0, self._count - 1)
        _numbers.pack_into(self._page, 8, *_values_of(times))
        _sequence.pack_into(self._page, 0, self._count)

    def close(self) -> None:
        """Nobody finds the page any more; who has it already keeps it. Idempotent."""
        if self._descriptor >= 0:
            self._page[_ABOUT_AT:] = bytes(_ABOUT_BYTES)
            self._page.close()
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCounters:
    """A moment of a running engine.

    Attributes:
      at_ns: when it was read, on the monotonic clock.
      times: the engine's totals.
      loaders: each loader's totals by the names in `COUNTERS`, by process id.
    """

    at_ns: int
    times: StepTimes
    loaders: dict[int, dict[str, int]]


class LiveReader:
    """Another process's view of an engine. It stays readable after the engine has ended, and keeps the engine's memory for as long.

    Attributes:
      pid: of the engine.
      about: what it said of itself.
    """

    def __init__(self, pid: int) -> None:
        """Finds a running engine.

        Raises:
          InflashError: there is no such process, it is not ours to look at, or no engine runs in it.
        """
        self.pid = pid
        try:
            places = _memory_files(pid)
        except PermissionError as error:
            raise InflashError(f"process {pid} belongs to somebody else; ask its owner, or root, to look at it") from error
        except OSError as error:
            raise InflashError(f"process {pid}: there is no such process; {_others()}") from error
        page = _own_page(pid, places)
        if page is None:
            raise InflashError(f"process {pid}: expected a running inflash engine, found none in it; {_others()}")
        self._page, self.about = page, _about(page)
        if self.about["version"] != __version__:
            raise InflashError(f"process {pid} runs inflash {self.about['version']}; use that version's command to look at it")
        try:
            slab = next(place for place in places[_SLAB_NAME] if place.endswith(f"/{self.about['slab']}"))
            self._counters = {
                loader: np.frombuffer(_map(slab, offset), np.uint64, len(COUNTERS)) for loader, offset in self.about["loaders"]
            }
        except (LookupError, StopIteration, OSError, ValueError) as error:
            raise InflashError(f"process {pid}: its engine has just ended; {_others()}") from error

    @property
    def ended(self) -> bool:
        """Whether the engine was closed; one whose process was killed could not say so."""
        return self._page[_ABOUT_AT] == 0

    def read(self) -> LiveCounters:
        """The counters of now.

        Raises:
          InflashError: the engine was ended while it wrote them.
        """
        deadline = time.monotonic() + _WRITING_S
        while True:
            before = _sequence.unpack_from(self._page, 0)[0]
            values = _numbers.unpack_from(self._page, 8)
            if before % 2 == 0 and _sequence.unpack_from(self._page, 0)[0] == before:
                break
            if time.monotonic() > deadline:
                raise InflashError(f"process {self.pid}: its engine has just ended; {_others()}")
            time.sleep(0.0001)
        loaders = {pid: _by_name(counters) for pid, counters in self._counters.items()}
        times = StepTimes(**dict(zip(_TIMES, values, strict=True)))
        return LiveCounters(at_ns=time.perf_counter_ns(), times=times, loaders=loaders)


def _by_name(counters: np.ndarray) -> dict[str, int]:
    return dict(zip(COUNTERS, counters.tolist(), strict=True))


def running_engines() -> list[int]:
    """Process ids of the engines that this user may look at."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if _own_page(int(folder.name), _memory_files(int(folder.name))) is not None:
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return sorted(found)


def _own_page(pid: int, places: dict[str, list[str]]) -> mmap.mmap | None:
    """The page of the newest engine in a process; those that it only looks at do not count."""
    for path in reversed(places.get(_NAME, [])):
        try:
            page = _map(path, 0)
            if _about(page).get("pid") == pid:
                return page
        except (OSError, ValueError):  # of an engine that has just begun to write it, or that has ended
            continue
    return None


def _about(page: mmap.mmap) -> dict[str, Any]:
    return json.loads(page[_ABOUT_AT:].rstrip(b"\0") or b"{}")


def _memory_files(pid: int) -> dict[str, list[str]]:
    """Paths of a process's memfds of ours, by name, in the order of their descriptors. Raises OSError."""
    folder = f"/proc/{pid}/fd"
    descriptors = sorted(map(int, os.listdir(folder)))
    found: dict[str, list[str]] = {}
    for descriptor in descriptors:
        try:
            target = os.readlink(f"{folder}/{descriptor}")
        except OSError:  # closed meanwhile
            continue
        name = target.removeprefix("/memfd:").removesuffix(" (deleted)")
        if name in (_NAME, _SLAB_NAME):
            found.setdefault(name, []).append(f"{folder}/{descriptor}")
    return found


def _others() -> str:
    engines = running_engines()
    if not engines:
        return "no engine of this user is running"
    return f"running engines: {', '.join(map(str, engines))}"


def _map(path: str, offset: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return mmap.mmap(descriptor, _PAGE, access=mmap.ACCESS_READ, offset=offset)
    finally:
        os.close(descriptor)
