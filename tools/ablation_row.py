"""One row of `inflash bench ablation`, in a process of its own: python -m inflash.tools.ablation_row CONFIG.

Reads its settings from the file that the argument names, prints a line of JSON for every token and one at the end. A real run of the same
engine as ever, fed with random tokens, because what a model would say next depends on the row's own rounding.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline import native_library
from ..pipeline.engine import Engine
from ..pipeline.options import EngineOptions
from ..storage.store import open_store
from .row_result import tell_result, tell_step

_MEMORY_EVERY = 50  # tokens between two looks at the processes' memory, which take time themselves
_DRIFT_TOKENS = 50  # compared at the beginning and at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class RowConfig:
    """What a row runs.

    Attributes:
      model: the store.
      options: fields of `EngineOptions`.
      split_rows: see `Engine`; "" for none.
      prompt_tokens, warm_up, tokens: of the prompt; decoded before anything counts; and measured.
      seed: of the token ids, the same for every row.
    """

    model: str
    options: dict[str, Any]
    split_rows: str
    prompt_tokens: int
    warm_up: int
    tokens: int
    seed: int

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.warm_up + self.tokens


def measure(config: RowConfig) -> dict[str, Any]:
    """Runs the row and returns its figures: medians of times over the measured tokens, means of what was read."""
    store = open_store(Path(config.model))
    options = EngineOptions(**config.options)
    split_rows = Path(config.split_rows) if config.split_rows else None
    token_ids = np.random.default_rng(config.seed).integers(4, store.config.vocab_size, config.length).astype(np.int32)
    with Engine(store, options, split_rows=split_rows) as engine:
        engine.prepare(1, config.length)
        engine.process_prompts([(0, token_ids[: config.prompt_tokens])])
        tokens, counters = [], engine.pool.counters()
        for position in range(config.prompt_tokens, config.length):
            tokens.append(_decode(engine, token_ids, position, counters))
            counted = position - config.prompt_tokens - config.warm_up
            if counted >= 0 and counted % _MEMORY_EVERY == 0:
                tokens[-1]["dram_bytes"] = held_bytes(engine)
            tell_step(position)
        summary = _summary(tokens[config.warm_up :], held_bytes(engine), options.loaders, store.bundles.bundle_bytes)
        return {**summary, "kernels": "native" if native_library.choose() else "xla"}


def _decode(engine: Engine, token_ids: np.ndarray, position: int, counters: dict[str, int]) -> dict[str, float]:
    """One token, and what it took since the last one's `counters` of the loaders, which are brought up to now: reads end in between."""
    times = engine.times.copy()
    began = time.perf_counter_ns()
    engine.decode(token_ids[position : position + 1], np.array([position], np.int32), np.ones(1, bool))
    total_ns = time.perf_counter_ns() - began
    spent = {name: getattr(engine.times, name) - getattr(times, name) for name in ("io_wait_ns", "memory_ns", "hits", "misses")}
    after = engine.pool.counters()
    spent |= {name: value - counters[name] for name, value in after.items()}
    counters.update(after)
    prefetched = engine.times.prefetched - times.prefetched
    return {**spent, "prefetched": prefetched, "total_ns": total_ns}


def _summary(tokens: list[dict[str, float]], dram_bytes: int, loaders: int, bundle_bytes: int) -> dict[str, Any]:
    def median_ms(*names: str) -> float:
        return statistics.median(sum(token[name] for name in names) for token in tokens) / 1e6

    def mean(name: str) -> float:
        return statistics.fmean(token[name] for token in tokens)

    total, waited, managed = median_ms("total_ns"), median_ms("io_wait_ns"), median_ms("memory_ns")
    compute = statistics.median(token["total_ns"] - token["io_wait_ns"] - token["memory_ns"] for token in tokens) / 1e6
    flash, busy_s = mean("bytes") + mean("gap_bytes"), mean("busy_ns") / loaders / 1e9
    needed = (mean("misses") + mean("prefetched")) * bundle_bytes
    return {
        "dram_bytes": dram_bytes,
        "flash_bytes_per_token": flash,
        "needed_bytes_per_token": needed or mean("bytes"),
        "reads_per_token": mean("reads"),
        "gb_per_s": flash / busy_s / 1e9 if busy_s else 0.0,
        "io_wait_ms": waited,
        "memory_ms": managed,
        "compute_ms": compute,
        "total_ms": total,
        "tokens_per_s": 1000 / total,
        "hit_rate": mean("hits") / max(mean("hits") + mean("misses"), 1),
        "misses_per_token": mean("misses"),
        "prefetched_per_token": mean("prefetched"),
        "drift": _drift(tokens),
    }


def _drift(tokens: list[dict[str, float]]) -> dict[str, float] | None:
    """Time and memory at the beginning and at the end; None for runs too short to tell."""
    if len(tokens) < 4 * _DRIFT_TOKENS:
        return None
    parts = {"first": tokens[_DRIFT_TOKENS : 2 * _DRIFT_TOKENS], "last": tokens[-_DRIFT_TOKENS:]}
    drift: dict[str, float] = {}
    for name, part in parts.items():
        drift[f"{name}_total_ms"] = statistics.median(token["total_ns"] for token in part) / 1e6
        drift[f"{name}_misses"] = statistics.fmean(token["misses"] + token["prefetched"] for token in part)
        drift[f"{name}_dram_bytes"] = next(token["dram_bytes"] for token in part if "dram_bytes" in token)
    return drift


def held_bytes(engine: Engine) -> int:
    """Memory of the engine and its loaders: the pages that each has to itself, and its share of those that several have."""
    total = 0
    for process in ("self", *engine.pool.process_ids):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def main() -> int:
    return tell_result(lambda: measure(RowConfig(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))


if __name__ == "__main__":
    sys.exit(main())
