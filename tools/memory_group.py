"""Memory limits that are real: a cgroup of its own for a command and all that it starts, page cache and shared memory counted."""

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup")
_LEAVE_S = 10.0
_numbers = itertools.count()


class NoCgroup(Exception):
    """Why no memory cgroup can be made here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroup:
    """A cgroup with a limit; either version."""

    folder: Path
    version: int

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
        """Runs a command in the group, every process that it starts included."""
        return subprocess.run(self.wrap(command), text=True, check=False, **options)

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command that joins the group before it becomes the given one."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    def peak_bytes(self) -> int | None:
        """The most memory that was in use; None where the kernel does not keep it."""
        file = self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(file.read_text()) if file.exists() else None


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A new group with a limit in bytes, removed afterwards.

    Raises:
      NoCgroup: not root, or no controller that could be used.
    """
    if os.geteuid() != 0:
        raise NoCgroup("only root may make cgroups")
    version = 1 if (CGROUP / "memory").is_dir() else 2
    parent = CGROUP / "memory" if version == 1 else CGROUP
    folder = parent / f"inflash-{os.getpid()}-{next(_numbers)}"
    limits = {1: ("memory.limit_in_bytes", "memory.swappiness"), 2: ("memory.max", "memory.swap.max")}[version]
    try:
        if version == 2 and "memory" not in (CGROUP / "cgroup.subtree_control").read_text().split():
            (CGROUP / "cgroup.subtree_control").write_text("+memory")
        _remove_left(parent)
        folder.mkdir()
    except OSError as error:
        raise NoCgroup(f"no group below {parent}: {error.strerror}") from error
    try:
        try:
            (folder / limits[0]).write_text(str(limit))
            if (folder / limits[1]).exists():
                (folder / limits[1]).write_text("0")  # swap would be memory by another name
        except OSError as error:
            raise NoCgroup(f"{folder}: no limit can be set: {error.strerror}") from error
        yield MemoryGroup(folder=folder, version=version)
    finally:
        _remove(folder)


@contextlib.contextmanager
def memory_group_where_possible(limit: int) -> Iterator[MemoryGroup | None]:
    """A new group with a limit in bytes, or None where none can be made."""
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(limit))
        except NoCgroup:
            group = None
        yield group


def _remove_left(parent: Path) -> None:
    """Removes groups whose makers were killed and that nobody is in."""
    for folder in parent.glob("inflash-*"):
        if not Path("/proc", folder.name.split("-")[1]).exists():
            with contextlib.suppress(OSError):  # processes are in it still, or somebody else was faster
                folder.rmdir()


def _remove(folder: Path) -> None:
    """Removes the group; processes that have been told to end may need a moment to leave it."""
    deadline = time.monotonic() + _LEAVE_S
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
