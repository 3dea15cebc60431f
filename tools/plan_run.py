"""Plans run for `inflash bench plan`, each a process in a memory cgroup of its own that waits after every turn of steps.

What a plan is predicted to take depends on how fast a shared machine is just then. So between turns this process, outside of the group,
measures the yardstick; each turn is held against what the cost model says for the state between its two looks. And what another plan
takes beside it is told by their turns in turn, as no look tells of the seconds in which a machine changes.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import InflashError
from ..pipeline.machine_state import MachineState
from .memory_group import memory_group_where_possible
from .row_process import ALLOWANCE_BYTES, RowProcess, running_row

_MEDIAN_ERROR = 1.25  # of a median, in standard errors of a mean


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
    with standing(config, memory_bytes) as row:
        try:
            row.answer("ready")
            turns, result = _watched_turns(row, look, seconds, most_steps)
        except InflashError as error:
            return {"failed": str(error), **row.memory()}
        memory = row.memory()
    return {
        "measured": result | _means([measured for measured, _ in turns]),
        "predicted": _means([predict(state) for _, state in turns]),
        "states": [state.to_json() for _, state in turns],
        **memory,
    }


@contextmanager
def standing(config: dict[str, Any], memory_bytes: int) -> Iterator[RowProcess]:
    """A run that says `ready` when it has warmed up, and then makes a turn whenever it is told to; arguments as in `run_watched`."""
    with (
        memory_group_where_possible(memory_bytes + ALLOWANCE_BYTES) as group,
        running_row("plan_row", config, group) as row,
    ):
        yield row


class OwnRunError(InflashError):
    """The run that others are held against ended."""


def run_in_turns(own: RowProcess, other: RowProcess, *, seconds: float, most_steps: int) -> dict[str, Any]:
    """Two runs by turns: what a step of the other took, and how much longer than the own one beside it.

    Args:
      own: is ready.
      other: was begun; ended here.
      seconds, most_steps: for each of both; at least three turns.

    Returns:
      `measured` and `beside_ms`, means over the turns, of medians; `longer`, the median over neighbouring turns, and its standard error;
      or `failed`.

    Raises:
      OwnRunError: see there.
    """
    turns: list[tuple[dict[str, float], dict[str, float]]] = []
    try:
        other.answer("ready")
        steps, end = 0, time.perf_counter() + 2 * seconds
        while len(turns) < 3 or (time.perf_counter() < end and steps < most_steps):
            turns.append((_own_turn(own), _turn(other)))
            steps += turns[-1][1]["steps"]
        other.end_input()
        result = other.answer("result")
    except OwnRunError:
        raise
    except InflashError as error:
        return {"failed": str(error)}
    times = [beside["total_ms"] / mine["total_ms"] for mine, beside in turns]
    return {
        "measured": result | _means([beside for _, beside in turns]),
        "beside_ms": statistics.fmean(mine["total_ms"] for mine, _ in turns),
        "longer": statistics.median(times) - 1,
        "longer_error": _MEDIAN_ERROR * statistics.stdev(times) / len(times) ** 0.5,
    }


def _own_turn(own: RowProcess) -> dict[str, float]:
    try:
        return _turn(own)
    except InflashError as error:
        raise OwnRunError(str(error)) from error


def _watched_turns(
    row: RowProcess, look: Callable[[], MachineState], seconds: float, most_steps: int
) -> tuple[list[tuple[dict[str, float], MachineState]], dict[str, Any]]:
    """Medians of each turn and the state that it ran in, and what the run says at its end."""
    turns: list[tuple[dict[str, float], MachineState]] = []
    steps, end, before = 0, time.perf_counter() + seconds, look()
    while len(turns) < 2 or (time.perf_counter() < end and steps < most_steps):
        medians, after = _turn(row), look()
        turns.append((medians, MachineState.between([before, after])))
        steps, before = steps + medians["steps"], after
    row.end_input()
    return turns, row.answer("result")


def _turn(row: RowProcess) -> dict[str, float]:
    """Medians over the steps of a turn, and how many they were."""
    row.tell("go")
    samples = row.answer("turn")
    medians: dict[str, float] = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    return medians | {"steps": len(samples)}


def _means(turns: list[dict[str, float]]) -> dict[str, float]:
    means = {name: statistics.fmean(turn[name] for turn in turns) for name in turns[0]}
    return means | ({"steps": sum(turn["steps"] for turn in turns)} if "steps" in means else {})
