"""The model that ships with inflash: sparse text equals dense text, and every byte read for it is accounted for."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import BUFFERED, convert_quietly

from inflash import LLM, InflashError, SamplingParams
from inflash.pipeline.evaluation import evaluate
from inflash.pipeline.model_files import load_tokenizer
from inflash.pipeline.text_windows import read_windows
from inflash.storage.layout import bundles_path, neuron_bytes, resident_bytes
from inflash.storage.predictor_file import read_predictor_file
from inflash.storage.predictor_store import add_predictor
from inflash.storage.readers import DirectFile
from inflash.storage.store import Store, open_store
from inflash.tools.demo import EMBEDDED, PREDICTOR
from inflash.tools.demo_corpus import held_out_half

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings(BUFFERED)]

NUM_TOKENS = 128
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
OPTIONS: dict[str, Any] = {"compute_dtype": "float32", "max_num_seqs": 8}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    assert (EMBEDDED / "model.safetensors").is_file(), f"{EMBEDDED} has no model, although it ships with inflash"
    return convert_quietly(EMBEDDED, tmp_path_factory.mktemp("embedded") / "store", dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (EMBEDDED / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 8
    return [json.loads(line)["body"]["prompt"] for line in lines]


@pytest.fixture(scope="module")
def dense(store: Store, prompts: list[str]) -> list[tuple[str, list[int]]]:
    """Text and tokens of each prompt with everything in memory."""
    with LLM(store.path, ffn="resident", **OPTIONS) as llm:
        return [(output.outputs[0].text, output.outputs[0].token_ids) for output in llm.generate(prompts, GREEDY)]


def loaders_read_bytes(llm: LLM) -> int:
    total = 0
    for process in llm.engine.pool.process_ids:
        lines = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
        total += int(lines["read_bytes"])
    return total


def settle(llm: LLM) -> int:
    """Bytes that the loaders have read, once they have read all that was asked for."""
    deadline = time.monotonic() + 10
    while (found := llm.engine.pool.counters()["bytes"]) != llm.engine.pool.bytes_requested and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def refuses_direct(store: Store) -> bool:
    file = DirectFile(store.path / bundles_path(0) / "c/0/0/0")
    try:
        return not file.can_read_directly(store.bundles.row_bytes, 0, 0)
    finally:
        file.close()


@pytest.mark.parametrize("cache", [{"cache_neurons": 0.25}, {"policy": "window", "window": 4}], ids=["quarter", "window"])
def test_sparse_text_is_dense_text(store: Store, prompts: list[str], dense, cache: dict[str, Any]) -> None:
    with LLM(store.path, ffn="sparse", predictor="exact", path="sparse", **cache, **OPTIONS) as llm:
        # Every token ends the first, whose length has the kernels compiled that are measured below.
        ended = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, stop_token_ids=[*range(llm.config.vocab_size)])
        llm.generate(prompts, [ended] + 7 * [SamplingParams(temperature=0, max_tokens=2)])  # every loader has opened every file
        pool = llm.engine.pool
        before = settle(llm), pool.bytes_requested, loaders_read_bytes(llm) - pool.counters()["gap_bytes"]
        outputs = llm.generate(prompts, GREEDY)
        after = settle(llm), pool.bytes_requested, loaders_read_bytes(llm) - pool.counters()["gap_bytes"]
        times = llm.engine.times
    assert [len(tokens) for _, tokens in dense] == [NUM_TOKENS] * 8
    assert [output.outputs[0].token_ids for output in outputs] == [tokens for _, tokens in dense]
    assert [output.outputs[0].text for output in outputs] == [text for text, _ in dense]

    counted, requested, from_disk = (int(value) for value in np.subtract(after, before))
    assert counted == requested > 0
    assert times.decode_bytes == times.misses * store.bundles.bundle_bytes
    if refuses_direct(store):
        pytest.skip(f"texts are equal; the kernel's count is of direct reads, which the file system under {store.path} refuses")
    assert from_disk == requested


def test_its_trained_predictor_keeps_the_dense_model_s_quality(store: Store, tmp_path: Path) -> None:
    """On modules of the standard library's tests that neither the model nor the predictor was trained on."""
    try:
        text = held_out_half("judging")
    except InflashError as error:
        pytest.skip(str(error))
    shutil.copytree(store.path, tmp_path / "store")
    trained = open_store(tmp_path / "store")
    info, layers = read_predictor_file(trained, EMBEDDED / f"{PREDICTOR}.safetensors")
    trained = add_predictor(trained, PREDICTOR, info, layers)
    tokenizer = load_tokenizer(trained)
    assert tokenizer is not None
    windows = read_windows(text[::8], tokenizer, bos_id=trained.config.bos_token_id, context=512, most_tokens=8_000)
    judged = evaluate(trained, windows, [PREDICTOR])
    found = judged["predictors"][PREDICTOR]
    assert found["recall"] >= 0.99
    assert found["predicted"] <= 3 * found["active"]
    assert found["perplexity"] == pytest.approx(judged["dense"]["perplexity"], rel=0.01)
    weights = (resident_bytes(trained.config, "bfloat16") + neuron_bytes(trained.config, "bfloat16")) // 2
    assert (
        sum(rank * (trained.config.d_model + trained.config.d_ff) + trained.config.d_ff for rank in info.ranks) <= 0.05 * weights
    )


def test_most_neurons_are_not_needed(store: Store, prompts: list[str]) -> None:
    """It was trained to be sparse: that is what makes it a model to show inflash with."""
    with LLM(store.path, ffn="sparse", predictor="exact", path="sparse", cache_neurons=1.0, **OPTIONS) as llm:
        llm.generate(prompts[:1], GREEDY)
        times, config = llm.engine.times, llm.config
    needed = (times.hits + times.misses) / (times.steps * config.num_layers * config.d_ff)
    assert needed < 0.1
