"""`inflash demo`: the main job on the small model that comes with inflash."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from ..errors import InflashError
from .table import table

EMBEDDED = Path(__file__).parent / "embedded"
PREDICTOR = "trained"
CACHE_SHARE = 0.5
_SHOWN_LINES = 10
_COMPARED_TOKENS = 64


def run(arguments: argparse.Namespace) -> int:
    store = arguments.output / "demo.inflash"
    _convert(store)
    _compare(store, _batch(arguments.output, store))
    return 0


def _convert(store: Path) -> None:
    from ..storage.checkpoint import open_source
    from ..storage.convert import convert
    from ..storage.predictor_file import read_predictor_file
    from ..storage.predictor_store import add_predictor
    from ..storage.store import open_store
    from .info import as_text, describe

    if not (EMBEDDED / "model.safetensors").exists():
        raise InflashError(f"{EMBEDDED}: the embedded model is missing from this installation; install inflash again")
    store.parent.mkdir(parents=True, exist_ok=True)
    if store.exists():
        shutil.rmtree(store)
    with open_source(EMBEDDED) as source:
        converted = convert(source, store)
    info, layers = read_predictor_file(converted, EMBEDDED / f"{PREDICTOR}.safetensors")
    add_predictor(converted, PREDICTOR, info, layers)
    print(
        "1. The embedded model, converted, and its trained predictor: `inflash convert`, `inflash import-predictor`, `inflash info`\n"
    )
    print(as_text(describe(open_store(store))), "\n")


def _batch(folder: Path, store: Path) -> list[str]:
    """Runs the prompts as a batch file would be run, and prints the answers and the cost."""
    from .cli import main

    requests = [json.loads(line) for line in (EMBEDDED / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    output = folder / "answers.jsonl"
    command = ["run-batch", "-i", str(EMBEDDED / "prompts.jsonl"), "-o", str(output), "--model", str(store)]
    command += ["--no-resume", "--cache-neurons", str(CACHE_SHARE)]
    print(f"2. A batch of prompts, {CACHE_SHARE:.0%} of the neurons in memory: `inflash {' '.join(command)}`\n")
    sys.stdout.flush()
    if code := main(command):
        raise InflashError(f"the batch ended with exit code {code}")
    answers = {line["custom_id"]: line for line in map(json.loads, output.read_text(encoding="utf-8").splitlines())}
    for request in requests:
        text = answers[request["custom_id"]]["response"]["body"]["choices"][0]["text"]
        lines = (request["body"]["prompt"] + text).splitlines()
        print(f"\n--- {request['custom_id']}")
        print("\n".join(lines[:_SHOWN_LINES]))
    print()
    return [request["body"]["prompt"] for request in requests]


def _compare(store: Path, prompts: list[str]) -> None:
    """How well sparse decoding agrees with the dense model, on the dense model's own continuations."""
    from ..pipeline.llm import LLM
    from ..pipeline.sampling_params import SamplingParams

    greedy = SamplingParams(max_tokens=_COMPARED_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(store, ffn="resident") as llm:
        texts = [output.prompt_token_ids + output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
        dense = [llm.logits(ids) for ids in texts]
        dense_memory = llm.engine.neuron_memory_bytes()
    rows = []
    for predictor in ("exact", PREDICTOR, "svd"):
        with LLM(store, ffn="sparse", predictor=predictor, cache_neurons=CACHE_SHARE) as llm:
            sparse = [llm.logits(ids) for ids in texts]
            llm.generate(prompts, greedy)
            summary = llm.engine.times.summary()
            memory = llm.engine.neuron_memory_bytes()
        rows.append(
            [
                predictor,
                f"{memory / dense_memory:.0%}",
                f"{100 * _agreement(dense, sparse):.1f}%",
                f"{_divergence(dense, sparse):.4f}",
                f"{100 * summary['predicted_share']:.1f}%",
                f"{summary['mib_per_token']:.3f}",
            ]
        )
    print(
        f"3. Sparse beside dense, on the dense model's own continuations; cache {CACHE_SHARE:.0%}, {len(prompts)} sequences together\n"
    )
    header = ["predictor", "cache + predictor", "same top token", "mean KL (nats)", "neurons used by any", "MiB read/token"]
    print(table(header, rows))


def _agreement(dense: list[np.ndarray], sparse: list[np.ndarray]) -> float:
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(dense, sparse, strict=True)]
    return float(np.concatenate(same).mean())


def _divergence(dense: list[np.ndarray], sparse: list[np.ndarray]) -> float:
    """Mean KL(dense || sparse) of the next-token distributions, nats."""
    values = []
    for a, b in zip(dense, sparse, strict=True):
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        values.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    return float(np.concatenate(values).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
