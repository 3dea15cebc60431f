"""A plan run and watched for `inflash bench plan`: some steps, then a look at the machine, and again.

What a plan is predicted to take depends on how fast a shared machine is just then. So the run, a process in a memory cgroup of its own,
waits after every turn while this process, outside of the group, measures the yardstick; each turn is held against what the cost model says
for the state between its two looks.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

from ..errors import InflashError
from ..pipeline.device import MachineState
from .memory_group import NoCgroup, memory_group

ALLOWANCE_BYTES = 64 << 20
PARTS = ("io_wait_ms", "memory_ms", "compute_ms", "total_ms")
_KILLED = (-9, 137)


def run_watched(
    config: dict[str, Any],
    memory_bytes: int,
    *,
    seconds: float,
    most_steps: int,
    look: Callable[[], MachineState],
    predict: Callable[[MachineState], dict[str, float]],
) -> dict[str, Any]:
    """A run of a plan: `measured`, `predicted` (means over the turns, of medians), `peak_bytes`, `limited`; or `failed`.

    Args:
      config: fields of `plan_row.RowConfig`.
      memory_bytes: of the cgroup, which may hold ALLOWANCE_BYTES more.
      seconds, most_steps: how long it is measured; at least two turns.
      look: measures the machine.
      predict: parts of a step in a state, in ms.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, contextlib.ExitStack() as stack:
        json.dump(config, file)
        file.flush()
        command, group = [sys.executable, "-P", "-m", "inflash.tools.plan_row", file.name], None
        with contextlib.suppress(NoCgroup):
            group = stack.enter_context(memory_group(memory_bytes + ALLOWANCE_BYTES))
            command = group.wrap(command)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                turns, result = _take_turns(process, look, seconds, most_steps)
            except InflashError as error:
                return {"failed": str(error), "peak_bytes": group.peak_bytes() if group else None}
        peak = group.peak_bytes() if group else None
    return {
        "measured": result | _means([measured for measured, _ in turns]),
        "predicted": _means([predict(state) for _, state in turns]),
        "states": [state.to_json() for _, state in turns],
        "peak_bytes": peak,
        "limited": group is not None,
    }


def _take_turns(
    process: subprocess.Popen, look: Callable[[], MachineState], seconds: float, most_steps: int
) -> tuple[list[tuple[dict[str, float], MachineState]], dict[str, Any]]:
    """Medians of each turn and the state that it ran in, and what the run says at its end."""
    assert process.stdin and process.stdout
    _answer(process.stdout, "ready", process)
    turns: list[tuple[dict[str, float], MachineState]] = []
    steps, end, before = 0, time.perf_counter() + seconds, look()
    while len(turns) < 2 or (time.perf_counter() < end and steps < most_steps):
        with contextlib.suppress(BrokenPipeError):  # how it ended is told below
            process.stdin.write("go\n")
            process.stdin.flush()
        samples = _answer(process.stdout, "turn", process)
        after = look()
        medians: dict[str, float] = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
        medians["steps"] = len(samples)
        turns.append((medians, MachineState.between([before, after])))
        steps, before = steps + len(samples), after
    process.stdin.close()
    return turns, _answer(process.stdout, "result", process)


def _answer(lines: IO[str], name: str, process: subprocess.Popen) -> Any:
    """Raises InflashError where the run says something else, or nothing."""
    line = lines.readline()
    if not line:
        code = process.wait()
        raise InflashError("ended by the kernel for its memory" if code in _KILLED else f"ended with {code}")
    document = json.loads(line)
    if name not in document:
        raise InflashError(document["error"])
    return document[name]


def _means(turns: list[dict[str, float]]) -> dict[str, float]:
    means = {name: statistics.fmean(turn[name] for turn in turns) for name in turns[0]}
    return means | ({"steps": sum(turn["steps"] for turn in turns)} if "steps" in means else {})
