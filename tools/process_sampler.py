"""What the kernel says of a run's processes while they run: CPU time, waiting for a processor, memory, faults, switches, bytes read.

Looking costs time on the machine that is being looked at. Cheap figures are taken at every turn; those that walk all of a process's
threads, or all its pages, so rarely that each takes less than `_SHARE` of one processor. And files are read with bare system calls: a
look at the threads opens dozens.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_SHARE = 0.0005
_THREADS_EVERY_S, _PSS_EVERY_S = 1.0, 2.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LONGEST = 16 << 10  # bytes of any of the files that are read


@dataclass(slots=True, kw_only=True)
class ProcessSample:
    """One process at one moment; totals are since it began. None: not looked at this time, or not told by this kernel.

    Attributes:
      at_ns: on the monotonic clock.
      user_s, system_s: CPU time.
      rss_bytes, pss_bytes: resident memory; with shared pages divided among those who share them.
      minor_faults, major_faults: page faults; major ones read from storage.
      threads: that there are.
      read_bytes: fetched from storage.
      queue_wait_s: that its threads were ready to run and waited for a processor.
      voluntary_switches, involuntary_switches: of its threads.
    """

    at_ns: int
    user_s: float
    system_s: float
    rss_bytes: int
    minor_faults: int
    major_faults: int
    threads: int
    read_bytes: int | None = None
    pss_bytes: int | None = None
    queue_wait_s: float | None = None
    voluntary_switches: int | None = None
    involuntary_switches: int | None = None


class ProcessSampler:
    """Samples of several processes by name, as long as they live.

    Attributes:
      samples: of every process, oldest first.
      pids: process ids by name.
    """

    def __init__(self) -> None:
        self.samples: dict[str, list[ProcessSample]] = {}
        self.pids: dict[str, int] = {}
        self._next: dict[tuple[str, str], float] = {}  # when a process is due for a costly look

    def sample(self, processes: Mapping[str, int]) -> None:
        """Takes one of each process that is there."""
        for name, pid in processes.items():
            sample = look_at(pid)
            if sample is None:
                continue
            for look, least_s in ((_add_threads, _THREADS_EVERY_S), (_add_pss, _PSS_EVERY_S)):
                began = time.monotonic()
                if began >= self._next.get((name, look.__name__), 0.0):
                    look(pid, sample)
                    ended = time.monotonic()
                    self._next[name, look.__name__] = ended + max(least_s, (ended - began) / _SHARE)
            self.pids[name] = pid
            self.samples.setdefault(name, []).append(sample)

    def document(self, origin_ns: int) -> dict[str, Any]:
        """Everything in JSON's types, by process: columns of equal length, times in seconds since `origin_ns`."""
        found = {}
        for name, samples in self.samples.items():
            rows = [asdict(sample) for sample in samples]
            columns = {key: [row[key] for row in rows] for key in rows[0]}
            columns["at_s"] = [(at - origin_ns) / 1e9 for at in columns.pop("at_ns")]
            found[name] = {"pid": self.pids[name], "samples": columns}
        return found


def look_at(pid: int) -> ProcessSample | None:
    """The cheap figures of a process; None when it is not there any more."""
    try:
        # Behind the name, which may have blanks and brackets in it.
        stat = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return None
    if stat[0] in b"ZX":
        return None
    return ProcessSample(
        at_ns=time.perf_counter_ns(),
        minor_faults=int(stat[7]),
        major_faults=int(stat[9]),
        user_s=int(stat[11]) * _TICK_S,
        system_s=int(stat[12]) * _TICK_S,
        threads=int(stat[17]),
        rss_bytes=int(stat[21]) * _PAGE_BYTES,
        read_bytes=_field(f"/proc/{pid}/io", b"\nread_bytes:"),
    )


def pss_bytes(pid: int) -> int | None:
    """Resident memory of a process, what it shares divided; None where the kernel does not tell. Walks all its pages."""
    kibibytes = _field(f"/proc/{pid}/smaps_rollup", b"\nPss:")
    return None if kibibytes is None else kibibytes * 1024


def _add_pss(pid: int, sample: ProcessSample) -> None:
    sample.pss_bytes = pss_bytes(pid)


def _add_threads(pid: int, sample: ProcessSample) -> None:
    """Sums over the threads there are: the process's own files in /proc speak of its first thread only."""
    waited, voluntary, involuntary = 0, 0, 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            folder = f"/proc/{pid}/task/{thread}"
            waited += int(_read(f"{folder}/schedstat").split()[1])
            status = _read(f"{folder}/status")
            voluntary += _number(status, b"\nvoluntary_ctxt_switches:") or 0
            involuntary += _number(status, b"\nnonvoluntary_ctxt_switches:") or 0
    except (OSError, IndexError, ValueError):  # a thread that ended meanwhile, or a kernel without these statistics
        return
    sample.queue_wait_s, sample.voluntary_switches, sample.involuntary_switches = waited / 1e9, voluntary, involuntary


def _field(file: str, key: bytes) -> int | None:
    """The number behind a key of a file; None where there is no such file, or no such key."""
    try:
        return _number(_read(file), key)
    except OSError:
        return None


def _number(text: bytes, key: bytes) -> int | None:
    at = text.find(key)
    return None if at < 0 else int(text[at + len(key) :].split(maxsplit=1)[0])


def _read(file: str) -> bytes:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.read(descriptor, _LONGEST)
    finally:
        os.close(descriptor)
