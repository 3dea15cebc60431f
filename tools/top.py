"""`inflash top`: a running engine, seen from outside, drawn again every second; a line a look where there is no terminal.

Figures are of the time between two looks, from counters that every engine keeps, and from /proc.
"""

import argparse
import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import InflashError
from ..pipeline.live import LiveCounters, LiveReader
from .amounts import rate_text, size_text
from .process_sampler import ProcessSample, look_at, pss_bytes

_BAR = 46
_OPENING_S = 20.0  # for a process to open its next engine
_FIELDS = ("time", "tokens/s", "step ms", "I/O wait", "memory", "compute", "hits", "read", "under way", "CPU", "PSS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Everything at one moment; `processes` by process id, the engine first."""

    counters: LiveCounters
    processes: dict[int, ProcessSample]


def run(arguments: argparse.Namespace) -> int:
    if arguments.interval <= 0:
        raise InflashError(f"--interval: expected seconds above 0, found {arguments.interval}")
    if arguments.count is not None and arguments.count < 1:
        raise InflashError(f"--count: expected a number of looks from 1 up, found {arguments.count}")
    try:
        return _watch(arguments.pid, arguments.interval, arguments.count)
    except KeyboardInterrupt:
        print()
        return 0


def _watch(pid: int, interval_s: float, count: int | None) -> int:
    reader = LiveReader(pid)
    before, looks, screen = _look(reader), 0, sys.stdout.isatty()
    if before is None:
        raise InflashError(f"process {pid} has ended")
    if not screen:
        print(_heading(reader))
        print("  ".join(f"{name:>9}" for name in _FIELDS))
    while count is None or looks < count:
        time.sleep(interval_s)
        now = _look(reader)
        if reader.ended and now is not None:
            reader = None  # else the process could not have the first engine's memory for the next one
            if (reader := _following(pid)) is None:
                print(f"process {pid} has closed its engine")
                return 0
            before = now = _look(reader)
        if now is None or before is None:
            print(f"process {pid} has ended")
            return 0
        change = Change(before, now)
        if screen:
            print(
                "\x1b[H\x1b[2J" + "\n".join((_heading(reader), *change.screen(colour="NO_COLOR" not in os.environ))), flush=True
            )
        else:
            print("  ".join(f"{cell:>9}" for cell in change.line()), flush=True)
        before, looks = now, looks + 1
    return 0


def _following(pid: int) -> LiveReader | None:
    """The next engine of a process that has closed one: requests that need more room make it open another."""
    end = time.monotonic() + _OPENING_S
    while time.monotonic() < end and look_at(pid) is not None:
        with contextlib.suppress(InflashError):
            return LiveReader(pid)
        time.sleep(0.1)
    return None


def _look(reader: LiveReader) -> Look | None:
    counters = reader.read()
    found = {pid: look_at(pid) for pid in (reader.pid, *counters.loaders)}
    if found[reader.pid] is None:
        return None
    return Look(counters=counters, processes={pid: sample for pid, sample in found.items() if sample is not None})


def _heading(reader: LiveReader) -> str:
    about = reader.about
    minutes, seconds = divmod(int(time.time() - about["started_s"]), 60)
    model = Path(about.get("model", "?")).name
    how = about.get("options", {})
    named = ", ".join(
        f"{key.replace('_', ' ')} {how[key]}" for key in ("ffn", "cache_neurons", "loaders", "queue_depth") if key in how
    )
    return f"inflash engine {reader.pid}, {model}, up {minutes}:{seconds:02}; {named}"


class Change:
    """What happened between two looks."""

    def __init__(self, before: Look, now: Look) -> None:
        self._before, self._now = before, now
        old, new = before.counters, now.counters
        self._seconds = max((new.at_ns - old.at_ns) / 1e9, 1e-9)
        spent = {
            name: getattr(new.times, name) - getattr(old.times, name)
            for name in ("steps", "tokens", "decode_ns", "io_wait_ns", "memory_ns")
        }
        spent |= {name: getattr(new.times, name) - getattr(old.times, name) for name in ("hits", "misses", "prompt_tokens")}
        self._spent, steps = spent, max(spent["steps"], 1)
        self.parts_ms = {
            "I/O wait": spent["io_wait_ns"] / 1e6 / steps,
            "memory": spent["memory_ns"] / 1e6 / steps,
            "compute": (spent["decode_ns"] - spent["io_wait_ns"] - spent["memory_ns"]) / 1e6 / steps,
        }
        self.tokens_per_s = spent["tokens"] / self._seconds
        self.step_ms = spent["decode_ns"] / 1e6 / steps
        named = spent["hits"] + spent["misses"]
        self.hit_rate = spent["hits"] / named if named else None
        self.bytes_per_s = (
            sum(counters["bytes"] - old.loaders[pid]["bytes"] for pid, counters in new.loaders.items()) / self._seconds
        )
        self.under_way = sum(counters["under_way"] for counters in new.loaders.values())

    def line(self) -> list[str]:
        """One cell for each of `_FIELDS`."""
        cpu = sum(self._cpu(pid) for pid in self._now.processes)
        pss = sum(pss_bytes(pid) or 0 for pid in self._now.processes)
        return [
            time.strftime("%H:%M:%S"), f"{self.tokens_per_s:.1f}", f"{self.step_ms:.1f}", *(f"{ms:.1f}" for ms in self.parts_ms.values()),
            self._hits(), rate_text(self.bytes_per_s), str(self.under_way), f"{100 * cpu:.0f} %", size_text(pss),
        ]  # fmt: skip

    def screen(self, *, colour: bool) -> list[str]:
        """Lines for a terminal."""
        spent, times = self._spent, self._now.counters.times
        lines = [
            "",
            f"{self.tokens_per_s:8.1f} tokens/s    {spent['tokens']} tokens in {spent['steps']} steps; "
            f"{times.tokens} since the start, prompts {times.prompt_tokens}",
            f"{self.step_ms:8.1f} ms a step   {self._bar(colour=colour)}",
            "             " + "   ".join(f"{name} {ms:.1f} ms" for name, ms in self.parts_ms.items()),
            f"{self._hits():>8} hits of the neuron cache",
            f"{rate_text(self.bytes_per_s):>8} from flash, {self.under_way} reads under way",
            "",
            f"{'process':<12}{'PID':>8}{'CPU':>8}{'PSS':>12}{'threads':>9}{'faults/s':>10}",
        ]
        for number, (pid, sample) in enumerate(self._now.processes.items()):
            name, pss = "engine" if pid == next(iter(self._now.processes)) else f"loader {number - 1}", pss_bytes(pid)
            faults = sample.minor_faults + sample.major_faults
            if (old := self._before.processes.get(pid)) is not None:
                faults -= old.minor_faults + old.major_faults
            cells = f"{name:<12}{pid:>8}{100 * self._cpu(pid):>6.0f} %{'-' if pss is None else size_text(pss):>12}"
            lines.append(f"{cells}{sample.threads:>9}{faults / self._seconds:>10.0f}")
        return [*lines, "", "Ctrl-C ends this, not the engine."]

    def _hits(self) -> str:
        return "-" if self.hit_rate is None else f"{100 * self.hit_rate:.1f} %"

    def _bar(self, *, colour: bool) -> str:
        total = sum(self.parts_ms.values())
        if total <= 0:
            return "no step in this time"
        bar = ""
        for mark, code, ms in zip("#=-", (31, 35, 34), self.parts_ms.values(), strict=True):
            piece = mark * round(_BAR * ms / total)
            bar += f"\x1b[{code}m{piece}\x1b[0m" if colour else piece
        return bar

    def _cpu(self, pid: int) -> float:
        """Processors that a process kept busy."""
        now, before = self._now.processes[pid], self._before.processes.get(pid)
        if before is None:
            return 0.0
        seconds = max((now.at_ns - before.at_ns) / 1e9, 1e-9)
        return (now.user_s + now.system_s - before.user_s - before.system_s) / seconds
