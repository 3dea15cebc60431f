"""One run of `inflash bench batch`, in a process of its own: python -m inflash.tools.batch_row CONFIG.

Reads its settings from the file named and prints lines of JSON: one after every step, and last what requests took together, from the first
prompt to the last token.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pipeline.llm import LLM
from ..pipeline.plan import CACHED
from ..pipeline.run_size import RunSize
from ..pipeline.sampling_params import SamplingParams
from .ablation_row import held_bytes
from .row_result import tell_result, tell_step

_WARM_UP_PROMPT, _WARM_UP_TOKENS = 16, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RowConfig:
    """What is run.

    Attributes:
      model, memory, path: see `EngineOptions`.
      batch: requests decoded together.
      prompts: token ids of each request.
      tokens: that each makes.
    """

    model: str
    memory: int
    path: str
    batch: int
    prompts: list[list[int]]
    tokens: int


def measure(config: RowConfig) -> dict[str, Any]:
    """Runs the requests, after a few tokens of the first of them that fill the caches."""
    with LLM(config.model, memory=config.memory, path=config.path, max_num_seqs=config.batch) as llm:
        params = _params(len(config.prompts), config.tokens)
        size = RunSize()
        for prompt, one in zip(config.prompts, params, strict=True):
            size.add(len(prompt), one)
        _run(
            llm,
            [prompt[:_WARM_UP_PROMPT] for prompt in config.prompts[: config.batch]],
            _params(config.batch, _WARM_UP_TOKENS),
            size,
        )
        before, read, began = llm.times.copy(), llm.engine.pool.bytes_requested, time.perf_counter()
        generated = _run(llm, config.prompts, params, size)
        seconds, after, engine = time.perf_counter() - began, llm.times, llm.engine
        layers = after.dense_layers + after.sparse_layers - before.dense_layers - before.sparse_layers
        steps, num_layers = after.steps - before.steps, len(engine.plan.ffn)
        ways = Counter(engine.plan.ffn)
        dense = after.dense_layers - before.dense_layers + steps * (num_layers - ways[CACHED])
        assert layers == steps * ways[CACHED]
        return {
            "seconds": seconds,
            "tokens": generated,
            "tokens_per_s": generated / seconds,
            "prompt_s": (after.prompt_ns - before.prompt_ns) / 1e9,
            "decode_s": (after.decode_ns - before.decode_ns) / 1e9,
            "io_wait_s": (after.io_wait_ns - before.io_wait_ns) / 1e9,
            "steps": steps,
            "read_mib_per_token": (engine.pool.bytes_requested - read) / 2**20 / generated,
            "dense_share": dense / max(steps * num_layers, 1),
            "together": engine.num_seqs,
            "cached_layers": ways[CACHED],
            "cache_share": sum(engine.plan.slots) / num_layers / engine.config.d_ff,
            "held_bytes": held_bytes(engine),
        }


def _params(count: int, tokens: int) -> list[SamplingParams]:
    return [SamplingParams(temperature=1, seed=row, ignore_eos=True, max_tokens=tokens) for row in range(count)]


def _run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], size: RunSize) -> int:
    """Runs requests; returns how many tokens they made."""
    requests = [llm.make_request(str(row), prompt, params[row], row) for row, prompt in enumerate(prompts)]
    return sum(len(output.outputs[0].token_ids) for output in llm.stream(requests, tell_step, size=size))


def main() -> int:
    return tell_result(lambda: measure(RowConfig(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))


if __name__ == "__main__":
    sys.exit(main())
