"""How much memory this process may still take: the machine's, or its cgroup's where one is smaller."""

import ctypes
import os
from functools import cache
from importlib import metadata
from pathlib import Path

from ..errors import InflashError

# The interpreter with jax, compiled kernels, and each loader process: measured, see docs/performance.md.
_ENGINE_BYTES = 190 << 20
LOADER_BYTES = 25 << 20
_CORE_BYTES = 2 << 20  # XLA has a thread for each processor; two are in the engine's figure
_PLUGIN_BYTES = 90 << 20  # JAX loads the libraries of a GPU that it knows of, also where it is told to leave it alone

_M_ARENA_MAX = -8  # of malloc.h

_libc = ctypes.CDLL(None)
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_FILES = {  # controller: limit, usage, and statistics' name of the page cache that can be dropped
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes() -> int:
    """Memory that can still be had, page cache that would give way counted as free."""
    free = _machine_available()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in set(controllers.split(",")) & set(_FILES):
            room = _cgroup_room(controller, path)
            free = free if room is None else min(free, room)
    return free


@cache
def engine_bytes() -> int:
    """What the engine's process takes on this machine, before any weights."""
    plugins = metadata.entry_points(group="jax_plugins")
    return _ENGINE_BYTES + max(_cores() - 2, 0) * _CORE_BYTES + bool(plugins) * _PLUGIN_BYTES


def program_bytes(loaders: int, *, from_nothing: bool = False) -> int:
    """What the engine's program and its loaders will still take beyond what this process holds now, or a new one."""
    if from_nothing:
        return engine_bytes() + loaders * LOADER_BYTES
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return max(engine_bytes() - resident_pages * os.sysconf("SC_PAGE_SIZE"), 0) + loaders * LOADER_BYTES


def keep_few_arenas() -> None:
    """Bounds the arenas of glibc's malloc, of which each thread would get one, and what one thread has freed no other could use.

    One for all is too few: the threads that compute then wait for each other's locks, for a tenth of a step that takes milliseconds.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 2 + _cores())


def trim() -> None:
    """Gives freed memory back to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def check_fits(parts: dict[str, int], advice: str) -> None:
    """Refuses a run that cannot fit before it starts.

    Args:
      parts: what the run will hold, in bytes by name.
      advice: what to do otherwise.

    Raises:
      InflashError: with the figures.
    """
    needed, free = sum(parts.values()), available_bytes()
    if needed > free:
        listed = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in parts.items() if size)
        raise InflashError(
            f"memory: this run needs {needed / 2**20:.0f} MiB ({listed}), found {free / 2**20:.0f} MiB available; {advice}"
        )


def _machine_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise InflashError("/proc/meminfo: expected a line 'MemAvailable', found none; inflash needs Linux")


def _cgroup_room(controller: str, path: str) -> int | None:
    """Bytes below the tightest limit from the process's group up to the root; None without a limit."""
    limit_file, usage_file, cache_name = _FILES[controller]
    mount = _CGROUP_ROOT / controller
    group = mount / path.lstrip("/")
    if not (group / limit_file).exists():  # inside a container the group itself is the mount
        group = mount
    rooms = []
    while group == mount or mount in group.parents:
        try:
            limit = (group / limit_file).read_text().strip()
            if limit != "max" and int(limit) < 1 << 60:
                used = int((group / usage_file).read_text())
                rooms.append(int(limit) - used + _statistic(group / "memory.stat", cache_name))
        except OSError:
            pass  # the root group has no such files
        group = group.parent
    return min(rooms, default=None)


def _statistic(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        key, value = line.split()
        if key == name:
            return int(value)
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0))
