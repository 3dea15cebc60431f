"""Runs many short requests through the embedded model and says what its processes hold of memory along the way.

    python tests/integration/batch_many.py --requests 10000

One JSON document on standard output. Memory is the proportional share (PSS) of the engine and its loaders together, the median of the
samples of each thousand requests. `main_thread` has what the operating system counted for the main thread after the first quarter:
shares of its time on a core, ready but without one, and asleep. Nobody looks on for that, and Python cannot take more than the first two.

With --py-spy FILE, a py-spy program looks at the engine's threads, native frames too, after the first quarter; the document then says for
which parts of its time the main thread was in a kernel, waiting, or in Python. Small kernels run in the thread that starts them, so a
sample counts as a kernel where XLA's runtime for the CPU, Eigen, the native kernels or a frame of no library (what XLA has compiled) is in
its stack; else as a wait where its innermost frame waits for the system; all else is Python, starting kernels, collecting garbage and
giving memory back included. Each look stops all threads for some 5 ms while disk and loaders go on, so it looks ten times a second only:
with a hundred looks the main thread was found in Python for half of its time when it was on a core for an eighth. Take seconds from a run
without.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from inflash.storage.checkpoint import open_source
from inflash.storage.convert import convert
from inflash.storage.predictor_file import read_predictor_file
from inflash.storage.predictor_store import add_predictor
from inflash.storage.store import open_store
from inflash.tools.demo import EMBEDDED, PREDICTOR

EVERY_S = 0.5
LOOKS_A_SECOND = 10
WAITS = (
    "syscall ",
    "poll ",
    "epoll_",
    "futex",
    "pthread_cond_",
    "sem_",
    "__futex",
    "__lll_lock_wait",
    "clock_nanosleep",
)  # innermost frames
KERNELS = ("xla::cpu::", "kernels-", "Eigen::")  # anywhere in the stack


def write_requests(file: Path, count: int) -> None:
    words = (EMBEDDED / "prompts.jsonl").read_text(encoding="utf-8").split()
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            start = number % (len(words) - 12)
            prompt = f"# {number}\n" + " ".join(words[start : start + 3 + number % 9])
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 4 + number % 13}
            stream.write(json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")


def proportional_bytes(pid: int) -> int:
    """Of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0
    for each in (pid, *map(int, children)):
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


class ThreadTimes:
    """What the operating system counts for a process's main thread, from the first look on."""

    def __init__(self) -> None:
        self._first: tuple[float, ...] | None = None
        self._last: tuple[float, ...] = ()

    def look(self, pid: int) -> None:
        on_core_ns, ready_ns, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
        self._last = (time.monotonic(), on_core_ns / 1e9, ready_ns / 1e9)
        self._first = self._first or self._last

    def shares(self) -> dict[str, float] | None:
        """None where there was no time between the first look and the last."""
        if self._first is None or self._last == self._first:
            return None
        seconds, on_core, ready = (last - first for first, last in zip(self._first, self._last, strict=True))
        shares = {"on_core": on_core / seconds, "ready": ready / seconds, "asleep": 1 - (on_core + ready) / seconds}
        return {name: round(share, 3) for name, share in shares.items()}


def watch(
    process: subprocess.Popen[bytes], output: Path, count: int, py_spy: str | None, stacks: Path, times: ThreadTimes
) -> dict[int, list[int]]:
    """Bytes seen while so many thousands of requests were answered."""
    seen: dict[int, list[int]] = {}
    profiler, file, answered = None, None, 0
    while process.poll() is None:
        time.sleep(EVERY_S)
        if file is None and output.exists():
            file = output.open("rb")
        answered += file.read().count(b"\n") if file else 0
        if answered:
            try:
                seen.setdefault(answered // 1000, []).append(proportional_bytes(process.pid))
                if 0.25 * count < answered < count:
                    times.look(process.pid)
            except (FileNotFoundError, ProcessLookupError):
                break  # it has just ended
        if py_spy and profiler is None and answered > 0.25 * count:
            words = [py_spy, "record", "--native", "--threads", "--idle", "--format", "raw", "--output", str(stacks)]
            words += ["--pid", str(process.pid), "--rate", str(LOOKS_A_SECOND)]
            profiler = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    if profiler is not None:
        profiler.wait(120)
    return seen


def main_thread_shares(stacks: Path) -> dict[str, Any]:
    """What the main thread was doing: in a kernel, waiting, or the rest, which is Python and what it calls to start kernels."""
    found: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for line in stacks.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        if "MainThread" not in stack:
            continue
        *_, frame = frames = stack.split(";")
        compiled = any(each.startswith("0x") and "(" not in each for each in frames)
        waiting = frame.startswith(WAITS)
        kind = "kernels" if compiled or any(mark in stack for mark in KERNELS) else "waits" if waiting else "python"
        found[kind] += int(count)
        if kind == "python":
            rest[frame] += int(count)
    total = sum(found.values())
    return {
        "samples": total,
        **{kind: round(found[kind] / total, 3) for kind in ("kernels", "waits", "python")},
        "rest": rest.most_common(20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--py-spy", metavar="FILE", help="the program, for a look at the engine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_source(EMBEDDED) as source:
            store = convert(source, folder / "store").path
        info, layers = read_predictor_file(open_store(store), EMBEDDED / f"{PREDICTOR}.safetensors")
        add_predictor(open_store(store), PREDICTOR, info, layers)
        requests, output = folder / "in.jsonl", folder / "out.jsonl"
        write_requests(requests, arguments.requests)
        words = [sys.executable, "-m", "inflash.tools.cli", "run-batch", "-i", str(requests), "-o", str(output)]
        words += ["--model", str(store), "--max-num-seqs", str(arguments.max_num_seqs), "--json"]
        began = time.monotonic()
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        times = ThreadTimes()
        seen = watch(process, output, arguments.requests, arguments.py_spy, folder / "stacks", times)
        said, _ = process.communicate()
        assert process.returncode == 0
        answers = [json.loads(line) for line in output.read_bytes().splitlines()]
        assert len({answer["custom_id"] for answer in answers}) == len(answers) == arguments.requests
        assert all(answer["error"] is None for answer in answers)
        document = {
            "requests": arguments.requests,
            "seconds": round(time.monotonic() - began, 1),
            "mib_by_thousand": {str(thousand): round(statistics.median(values) / 2**20, 1) for thousand, values in seen.items()},
            "run": json.loads(said),
            "main_thread": times.shares(),
            "profile": main_thread_shares(folder / "stacks") if arguments.py_spy else None,
            "processors": os.cpu_count(),
        }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
