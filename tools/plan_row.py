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
from .decoded_steps import DecodedSteps
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
        steps = DecodedSteps(engine, token_ids, config.prompt_tokens, plan.max_length)
        warm_up = config.most_warm_up if CACHED in plan.ffn else min(config.most_warm_up, 3)
        num_warm = len(steps.run(config.warm_up_s, warm_up))
        print(json.dumps({"ready": True}), flush=True)
        for _ in turns:
            print(json.dumps({"turn": steps.run(config.turn_s)}), flush=True)
        return {"warm_up": num_warm, "prompt_s": prompt_s, "held_bytes": held_bytes(engine)}


def main() -> int:
    return tell_result(lambda: measure(RowConfig(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), sys.stdin))


if __name__ == "__main__":
    sys.exit(main())
