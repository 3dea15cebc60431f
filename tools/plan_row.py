"""One run of `inflash bench plan`, in a process of its own: python -m inflash.tools.plan_row CONFIG.

Reads its settings from the file that the argument names and prints lines of JSON: `ready` after the warm-up; for every line that it is then
sent, what a few steps took, so that whoever sends it can look at the machine in between; at the end of its input, the result.
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.engine import Engine
from ..pipeline.options import EngineOptions
from ..pipeline.plan import CACHED, Plan
from ..storage.store import open_store
from .ablation_row import held_bytes
from .row_result import tell_result


@dataclass(frozen=True, slots=True, kw_only=True)
class RowConfig:
    """What is run.

    Attributes:
      model, options, plan: the store, and fields of `EngineOptions` and `Plan`.
      token_ids: a list for each sequence; the first `prompt_tokens` are its prompt.
      prompt_tokens: see there.
      warm_up_s: about so long, and at least two steps.
      most_warm_up: steps at most.
      turn_s: steps that are told together take about so long.
    """

    model: str
    options: dict[str, Any]
    plan: dict[str, Any]
    token_ids: list[list[int]]
    prompt_tokens: int
    warm_up_s: float
    most_warm_up: int
    turn_s: float


def measure(config: RowConfig, turns: Iterable[str]) -> dict[str, Any]:
    """Runs as many turns as there are, and prints each; returns what the run was like."""
    plan, token_ids = Plan.from_json(config.plan), np.asarray(config.token_ids, np.int32)
    with Engine(open_store(Path(config.model)), EngineOptions(**config.options), plan=plan) as engine:
        engine.prepare(plan.num_seqs, plan.max_length)
        began = time.perf_counter()
        engine.process_prompts([(row, ids[: config.prompt_tokens]) for row, ids in enumerate(token_ids)])
        prompt_s = time.perf_counter() - began
        steps = _Steps(engine, token_ids, config.prompt_tokens)
        warm_up = config.most_warm_up if CACHED in plan.ffn else min(config.most_warm_up, 3)
        num_warm = len(steps.run(config.warm_up_s, warm_up))
        print(json.dumps({"ready": True}), flush=True)
        for _ in turns:
            print(json.dumps({"turn": steps.run(config.turn_s)}), flush=True)
        return {"warm_up": num_warm, "prompt_s": prompt_s, "held_bytes": held_bytes(engine)}


class _Steps:
    """Decodes known tokens on and on; at the end of the KV cache it begins again behind the prompts."""

    def __init__(self, engine: Engine, token_ids: np.ndarray, prompt_tokens: int) -> None:
        self._engine, self._token_ids, self._prompt = engine, token_ids, prompt_tokens
        self._at = 0

    def run(self, seconds: float, most: int = 1 << 30) -> list[dict[str, float]]:
        """What each step took, in ms, and what was read for it."""
        samples: list[dict[str, float]] = []
        end = time.perf_counter() + seconds
        while len(samples) < 2 or (time.perf_counter() < end and len(samples) < most):
            samples.append(self._step())
        return samples

    def _step(self) -> dict[str, float]:
        engine, room = self._engine, self._engine.plan.max_length - self._prompt
        tokens = self._token_ids[:, (self._prompt + self._at) % self._token_ids.shape[1]]
        positions = np.full(len(tokens), self._prompt + self._at % room, np.int32)
        times, counters = engine.times.copy(), engine.pool.counters()
        began = time.perf_counter_ns()
        engine.decode(tokens, positions, np.ones(len(tokens), bool))
        total = time.perf_counter_ns() - began
        self._at += 1
        waited, managed = engine.times.io_wait_ns - times.io_wait_ns, engine.times.memory_ns - times.memory_ns
        read = {name: value - counters[name] for name, value in engine.pool.counters().items()}
        return {
            "io_wait_ms": waited / 1e6,
            "memory_ms": managed / 1e6,
            "compute_ms": (total - waited - managed) / 1e6,
            "total_ms": total / 1e6,
            "read_bytes": read["bytes"] + read["gap_bytes"],
            "reads": read["reads"],
        }


def main() -> int:
    return tell_result(lambda: measure(RowConfig(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), sys.stdin))


if __name__ == "__main__":
    sys.exit(main())
