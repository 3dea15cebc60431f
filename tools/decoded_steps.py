"""Decoding steps of an engine, timed one by one: those of `inflash bench plan`'s rows, and of the tiny model that tells their pace."""

import time
from typing import Any

import numpy as np


class DecodedSteps:
    """Decodes known tokens on and on; at the end of the KV cache it begins again behind the prompts."""

    def __init__(self, engine: Any, token_ids: np.ndarray, prompt_tokens: int, length: int) -> None:
        """`token_ids`: [B, n] int32; the first `prompt_tokens` of each sequence are passed by. `length`: of the KV cache."""
        self._engine, self._token_ids, self._prompt, self._room = engine, token_ids, prompt_tokens, length - prompt_tokens
        self._at = 0

    def run(self, seconds: float, most: int = 1 << 30) -> list[dict[str, float]]:
        """What each step took, in ms, and what was read for it: at least two, until so long has passed."""
        samples: list[dict[str, float]] = []
        end = time.perf_counter() + seconds
        while len(samples) < 2 or (time.perf_counter() < end and len(samples) < most):
            samples.append(self._step())
        return samples

    def _step(self) -> dict[str, float]:
        engine = self._engine
        tokens = self._token_ids[:, (self._prompt + self._at) % self._token_ids.shape[1]]
        positions = np.full(len(tokens), self._prompt + self._at % self._room, np.int32)
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
