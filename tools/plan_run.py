"""A plan run and watched for `inflash bench plan`: some steps, then a look at the machine, and again.

What a plan is predicted to take depends on how fast a shared machine is just then. So the run, a process in a memory cgroup of its own,
waits after every turn while this process, outside of the group, measures the yardstick; each turn is held against what the cost model says
for the state between its two looks.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from ..errors import InflashError
from ..pipeline.machine_state import MachineState
from .memory_group import memory_group_where_possible
from .row_process import ALLOWANCE_BYTES, RowProcess, running_row


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
    with (
        memory_group_where_possible(memory_bytes + ALLOWANCE_BYTES) as group,
        running_row("plan_row", config, group) as row,
    ):
        try:
            turns, result = _take_turns(row, look, seconds, most_steps)
        except InflashError as error:
            return {"failed": str(error), **row.memory()}
        memory = row.memory()
    return {
        "measured": result | _means([measured for measured, _ in turns]),
        "predicted": _means([predict(state) for _, state in turns]),
        "states": [state.to_json() for _, state in turns],
        **memory,
    }


def _take_turns(
    row: RowProcess, look: Callable[[], MachineState], seconds: float, most_steps: int
) -> tuple[list[tuple[dict[str, float], MachineState]], dict[str, Any]]:
    """Medians of each turn and the state that it ran in, and what the run says at its end."""
    row.answer("ready")
    turns: list[tuple[dict[str, float], MachineState]] = []
    steps, end, before = 0, time.perf_counter() + seconds, look()
    while len(turns) < 2 or (time.perf_counter() < end and steps < most_steps):
        row.tell("go")
        samples = row.answer("turn")
        after = look()
        medians: dict[str, float] = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
        medians["steps"] = len(samples)
        turns.append((medians, MachineState.between([before, after])))
        steps, before = steps + len(samples), after
    row.end_input()
    return turns, row.answer("result")


def _means(turns: list[dict[str, float]]) -> dict[str, float]:
    means = {name: statistics.fmean(turn[name] for turn in turns) for name in turns[0]}
    return means | ({"steps": sum(turn["steps"] for turn in turns)} if "steps" in means else {})
