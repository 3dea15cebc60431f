"""`inflash bench llm`: tokens a second of a model on this machine, in the form that llama.cpp's llama-bench made familiar.

Axes: B sequences, V vocabulary.

A test is a prompt (pp512), generated tokens from an empty context (tg128), or one after the other (pp512+tg128), for B sequences at
once. Token ids are random and go to the engine directly, so the speed does not depend on what the model says, and neither the tokenizer
nor sampling counts. Every repetition has tokens of its own: the same ones again would find their neurons in the cache. What --ffn sparse
reads does depend on the tokens; random ones need more neurons and share fewer than a text's, so text is faster.

The first repetition of a test does not count. It fills the neuron cache, as a long run would; everything is compiled before it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InflashError
from ..storage.layout import resident_layers, resident_specs
from ..storage.store import Store, open_store
from . import arguments as flags
from .progress import progress_bar
from .table import table

if TYPE_CHECKING:
    from ..pipeline.engine import Engine
    from ..pipeline.options import EngineOptions

_PROMPT_TOKENS, _GENERATED_TOKENS = 512, 128  # llama-bench's


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTest:
    """What is measured: tokens of each sequence.

    Attributes:
      prompt: tokens of the prompt; 0: none.
      generated: tokens that are decoded after it, one at a time; 0: none.
    """

    prompt: int = 0
    generated: int = 0

    @property
    def name(self) -> str:
        parts = [f"pp{self.prompt}"] * bool(self.prompt) + [f"tg{self.generated}"] * bool(self.generated)
        return "+".join(parts)

    @property
    def flag(self) -> str:
        """How it was asked for."""
        if self.prompt and self.generated:
            return f"-pg {self.prompt},{self.generated}"
        return f"-p {self.prompt}" if self.prompt else f"-n {self.generated}"

    @property
    def num_tokens(self) -> int:
        return self.prompt + self.generated


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table and, as the last line, one JSON document.

    Raises:
      InflashError: there is nothing to measure, the model has fewer positions than a test needs, or the engine refuses.
    """
    options = flags.engine_options(arguments)
    tests = _tests(arguments)
    store = open_store(arguments.model)
    _check_lengths(tests, store, options)
    with _open_engine(store, options, max(test.num_tokens for test in tests)) as engine:
        samples = _Measurement(engine, arguments.repetitions).samples(tests)
        document = _document(store, engine, tests, samples)
    print(_heading(document))
    print(_as_table(document), end="\n\n")
    print(json.dumps(document))
    return 0


def _open_engine(store: Store, options: "EngineOptions", longest: int) -> "Engine":
    """With a memory budget, planned for the longest test."""
    from ..pipeline.engine import Engine
    from ..pipeline.planned_engine import PlannedEngine

    if options.memory is None:
        return Engine(store, options)
    engine = PlannedEngine(store, options).open_for(options.max_num_seqs, longest)
    if engine.plan.num_seqs < options.max_num_seqs:
        engine.close()
        raise InflashError(
            f"--memory: there is room for {engine.plan.num_seqs} sequences of {longest} tokens, found -b {options.max_num_seqs}; "
            "give more, or ask for fewer"
        )
    return engine


def _tests(arguments: argparse.Namespace) -> list[SpeedTest]:
    """Prompts, generation, then both together, each as often as asked for."""
    prompts = [_PROMPT_TOKENS] if arguments.n_prompt is None else arguments.n_prompt
    generated = [_GENERATED_TOKENS] if arguments.n_gen is None else arguments.n_gen
    tests = [SpeedTest(prompt=count) for count in prompts if count] + [SpeedTest(generated=count) for count in generated if count]
    tests += [SpeedTest(prompt=prompt, generated=count) for prompt, count in arguments.pg]
    if not tests:
        raise InflashError("bench llm: expected something to measure, found -p 0 and -n 0; give one of them tokens, or -pg PP,TG")
    return tests


def _check_lengths(tests: Sequence[SpeedTest], store: Store, options: "EngineOptions") -> None:
    positions = store.config.max_positions
    if (options.max_model_len or 0) > positions:
        raise InflashError(f"--max-model-len {options.max_model_len}: {store.path} has {positions} positions; give at most these")
    limit = options.max_model_len or positions
    for test in tests:
        if test.num_tokens > limit:
            whose = f"--max-model-len is {limit}" if options.max_model_len else f"{store.path} has {limit} positions"
            found = f"{test.prompt} + {test.generated}" if test.prompt and test.generated else f"{test.num_tokens}"
            raise InflashError(f"{test.flag}: expected at most {limit} tokens, as {whose}, found {found}; ask for fewer")


class _Measurement:
    """Runs tests on an engine with random tokens."""

    def __init__(self, engine: "Engine", repetitions: int) -> None:
        self._engine, self._repetitions = engine, repetitions
        self._num_seqs = engine.options.max_num_seqs
        self._rng = np.random.default_rng(engine.options.seed % 2**64)  # NumPy takes no negative seeds

    def samples(self, tests: Sequence[SpeedTest]) -> list[list[float]]:
        """Tokens a second of each repetition of each test, in the order of the tests.

        The shortest go first: the KV cache only grows, and a prompt attends over all of it.
        """
        self._check_memory(max(test.num_tokens for test in tests))
        found: dict[int, list[float]] = {}
        total = sum(test.num_tokens for test in tests) * self._num_seqs * (1 + self._repetitions)
        with progress_bar(total=total, unit=" tokens", leave=False) as bar:
            self._bar = bar
            for number in sorted(range(len(tests)), key=lambda number: tests[number].num_tokens):
                found[number] = self._repeated(tests[number])
        return [found[number] for number in range(len(tests))]

    def _check_memory(self, longest: int) -> None:
        """What `prepare` would refuse for the last test, before the others are measured."""
        from ..pipeline.fixed_shapes import capacity_for
        from ..pipeline.host_memory import check_fits
        from ..pipeline.memory_parts import kv_cache_bytes

        capacity = capacity_for(longest)
        needed = {
            f"KV cache of {self._num_seqs} x {capacity} tokens": kv_cache_bytes(self._engine.store, self._num_seqs * capacity)
        }
        check_fits(needed, "use a smaller -b, or shorter tests")

    def _repeated(self, test: SpeedTest) -> list[float]:
        self._show(test, "preparing")
        self._engine.prepare(self._num_seqs, test.num_tokens)
        seconds = []
        for repetition in range(1 + self._repetitions):
            self._show(test, f"{repetition} of {self._repetitions}" if repetition else "warm-up")
            seconds.append(self._prompts(test.prompt) + self._generation(test.prompt, test.generated))
        return [test.num_tokens * self._num_seqs / elapsed for elapsed in seconds[1:]]

    def _prompts(self, length: int) -> float:
        """Seconds for a prompt of every sequence; as many together as the scheduler would admit."""
        elapsed = 0.0
        together = max(1, self._engine.plan.prompt_tokens // max(length, 1))
        prompts = list(enumerate(self._random_ids(self._num_seqs, length))) if length else []
        for start in range(0, len(prompts), together):
            admitted = prompts[start : start + together]
            began = time.perf_counter()
            self._engine.process_prompts(admitted)
            elapsed += time.perf_counter() - began
            self._bar.update(length * len(admitted))
        return elapsed

    def _generation(self, start: int, count: int) -> float:
        """Seconds for tokens of every sequence from position `start` on, one step after the other."""
        elapsed = 0.0
        active = np.ones(self._num_seqs, bool)
        for position, token_ids in enumerate(self._random_ids(count, self._num_seqs), start):
            positions = np.full(self._num_seqs, position, np.int32)
            began = time.perf_counter()
            self._engine.decode(token_ids, positions, active)
            elapsed += time.perf_counter() - began
            self._bar.update(self._num_seqs)
        return elapsed

    def _show(self, test: SpeedTest, state: str) -> None:
        self._bar.set_description(f"{test.name}, {state}", refresh=sys.stderr.isatty())  # a log has a line every so often

    def _random_ids(self, *shape: int) -> np.ndarray:
        return self._rng.integers(0, self._engine.config.vocab_size, shape, np.int32)


def _document(store: Store, engine: "Engine", tests: Sequence[SpeedTest], samples: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What the last line says; docs/cli.md lists the keys."""
    options = engine.options
    return {
        "model": str(store.path),
        "size_bytes": store.num_bytes,
        "parameters": _parameters(store),
        "dtype": store.dtype,
        "ffn": options.ffn,
        "predictor": engine.plan.predictor,
        "cached_share": sum(engine.plan.slots) / (store.config.d_ff * store.config.num_layers),
        "max_num_seqs": options.max_num_seqs,
        "memory_bytes": _memory_bytes(engine),
        "results": [
            {
                "test": test.name,
                "prompt_tokens": test.prompt,
                "generated_tokens": test.generated,
                "tokens_per_s": statistics.mean(values),
                "standard_deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "repetitions": len(values),
                "samples": list(values),
            }
            for test, values in zip(tests, samples, strict=True)
        ],
    }


def _memory_bytes(engine: "Engine") -> int:
    """Everything that the run held, by the engine's own account, the whole program and its loaders included."""
    from ..pipeline.host_memory import LOADER_BYTES, engine_bytes

    elsewhere = {"program", "slab"}  # of the program the part that was still to come; the slab holds neurons and buffers
    parts = sum(size for name, size in engine.memory_bytes().items() if name not in elsewhere)
    return parts + engine_bytes() + engine.options.loaders * LOADER_BYTES


def _parameters(store: Store) -> int:
    """Weights of the model, the neurons' included, the predictors' not."""
    resident = sum(
        int(np.prod(spec.shape))
        for layer in resident_layers(store.config)
        for spec in resident_specs(store.config, layer, store.dtype)
    )
    return resident + store.config.num_layers * int(np.prod(store.bundles.shape))


def _heading(document: dict[str, Any]) -> str:
    sequences = document["max_num_seqs"]
    parts = [f"{document['model']}: {document['dtype']}", f"{sequences} sequence{'s together' if sequences > 1 else ''}"]
    if document["predictor"]:
        parts.append(f"predictor {document['predictor']}")
    if document["cached_share"]:
        parts.append(f"{document['cached_share']:.0%} of the neurons in memory")
    return ", ".join(parts)


def _as_table(document: dict[str, Any]) -> str:
    """llama-bench's columns, with ours for what differs here."""
    rows = [
        [
            Path(document["model"]).resolve().name,
            _gib(document["size_bytes"]),
            _billions(document["parameters"]),
            document["ffn"],
            _gib(document["memory_bytes"]),
            result["test"],
            f"{result['tokens_per_s']:.2f} ± {result['standard_deviation']:.2f}",
        ]
        for result in document["results"]
    ]
    width = max(len(row[-1]) for row in rows)
    return table(["model", "size", "params", "ffn", "memory", "test", "t/s"], [[*row[:-1], row[-1].rjust(width)] for row in rows])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
