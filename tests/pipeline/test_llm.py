"""The public face, over a random model whose tokens are bytes."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compilations import num_compilations
from golden_logits import golden_prompts, write_golden_checkpoint
from opt_checkpoints import write_opt_checkpoint
from safetensors.numpy import load_file, save_file
from tiny_models import BUFFERED, END, FIRST_BYTE, VOCAB_SIZE, convert_quietly, make_store

import inflash
from inflash import LLM, InflashError, RequestOutput, SamplingParams
from inflash.errors import RunError
from inflash.pipeline.chat_template import ChatTemplateError
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.requests import Request
from inflash.pipeline.run_size import RunSize
from inflash.storage.store import Store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True, seed=1234)
HOT = 20.0
"""A temperature at which no random model prefers any token: different draws of eight tokens are different."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("bytes"), tokenizer=True, num_hidden_layers=2)


@pytest.fixture(scope="module")
def llm(store: Store) -> Iterator[LLM]:
    with LLM(store.path, predictor="exact", max_num_seqs=4, queue_depth=2) as opened:
        yield opened


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def random_prompts(count: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng()
    return [rng.integers(FIRST_BYTE, VOCAB_SIZE, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    """Eleven prompts through four slots, ending at different times."""
    prompts = random_prompts(11)
    params = [SamplingParams(temperature=0, max_tokens=1 + number * 5 % 13, ignore_eos=True) for number in range(11)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [param.max_tokens for param in params]
    for output in outputs:
        assert output.finished
        (only,) = output.outputs
        assert (only.index, only.finish_reason, only.stop_reason) == (0, "length", None)
        assert (only.logprobs, only.cumulative_logprob) == (None, None)
    assert len({output.request_id for output in outputs}) == 11


def test_greedy_text_is_what_the_logits_say(llm: LLM) -> None:
    (prompt,) = random_prompts(1)
    (output,) = llm.generate([prompt], GREEDY)
    chosen = output.outputs[0].token_ids
    logits = llm.logits(prompt + chosen[:-1])
    assert logits.shape == (len(prompt) + 11, VOCAB_SIZE)
    assert logits.dtype == np.float32
    assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == chosen


def test_text_is_what_the_tokens_say(llm: LLM) -> None:
    assert llm.tokenizer is not None
    (output,) = llm.generate("sea", DRAWN)
    assert output.prompt == "sea"
    assert llm.tokenizer.decode(output.prompt_token_ids) == "sea"
    chosen, text = output.outputs[0].token_ids, output.outputs[0].text
    whole = llm.tokenizer.decode(chosen)
    assert text == whole.rstrip("\ufffd") or whole.startswith(text)  # bytes of an unfinished character are held back
    assert len(whole) - len(text) <= 3


def test_prompts_of_every_form(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("sea").ids
    forms: list[Any] = ["sea", {"prompt": "sea"}, {"prompt_token_ids": ids}, ids]
    outputs = llm.generate(forms, GREEDY)
    assert token_ids(outputs) == [token_ids(outputs)[0]] * 4
    assert [output.prompt for output in outputs] == ["sea", "sea", None, None]
    for form in forms:  # one prompt needs no list
        assert len(llm.generate(form, GREEDY)) == 1
    assert llm.generate([], GREEDY) == []


def test_seeds_repeat_and_batch_mates_do_not_matter(llm: LLM) -> None:
    mine, *others = random_prompts(7)
    (alone,) = token_ids(llm.generate([mine], DRAWN))
    mates = [SamplingParams(temperature=1.3, max_tokens=n + 2, ignore_eos=True) for n in range(6)]
    together = token_ids(llm.generate([*others[:3], mine, *others[3:]], [*mates[:3], DRAWN, *mates[3:]]))
    assert together[3] == alone
    filtered = [SamplingParams(temperature=1, top_k=5, top_p=0.9, max_tokens=4, repetition_penalty=1.2)] * 6
    assert token_ids(llm.generate([*others, mine], [*filtered, DRAWN]))[6] == alone
    hot = [SamplingParams(temperature=HOT, max_tokens=12, ignore_eos=True, seed=seed) for seed in (1234, 4321, 1234)]
    first, other, again = token_ids(llm.generate([mine] * 3, hot))
    assert first == again != other


def test_prompts_without_seeds_differ_and_repeat_with_the_engines(llm: LLM) -> None:
    params = SamplingParams(temperature=HOT, max_tokens=12, ignore_eos=True)
    first = token_ids(llm.generate(["same", "same", "same"], params))
    assert len({tuple(ids) for ids in first}) == 3
    assert token_ids(llm.generate(["same", "same", "same"], params)) == first


def test_several_continuations(llm: LLM) -> None:
    params = SamplingParams(n=6, temperature=HOT, max_tokens=8, ignore_eos=True, seed=99)
    several, once = llm.generate(["sea", "sky"], [params, GREEDY])
    assert [output.index for output in several.outputs] == list(range(6))
    assert len({tuple(output.token_ids) for output in several.outputs}) == 6
    assert len(once.outputs) == 1
    single = SamplingParams(n=1, temperature=HOT, max_tokens=8, ignore_eos=True, seed=99)
    assert token_ids(llm.generate("sea", single)) == [several.outputs[0].token_ids]
    mates = SamplingParams(n=5, temperature=1.5, max_tokens=5, top_p=0.8, logprobs=2)
    among = llm.generate(["sky", "sea", "sun"], [mates, params, mates])[1]
    assert [output.token_ids for output in among.outputs] == [output.token_ids for output in several.outputs]


def test_requests_are_taken_when_there_is_room_for_them(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    taken: list[int] = []
    size = RunSize()
    for _ in range(30):
        size.add(3, params)

    def source() -> Iterator[Request]:
        for number in range(30):
            taken.append(number)
            yield llm.make_request(f"{number}", "sea", params, number)

    stream = llm.stream(source(), size=size, ready=lambda: len(taken) != 20)
    first = next(stream)
    assert len(taken) == llm.engine.num_seqs < 20
    finished = [first.request_id, *(output.request_id for output in stream)]
    assert sorted(map(int, finished)) == list(range(30))  # not ready stops it only while something is running


def test_stop_strings_cut_the_text(llm: LLM) -> None:
    params = {"temperature": HOT, "max_tokens": 33, "ignore_eos": True, "seed": 7}
    (free,) = llm.generate("sea", SamplingParams(**params))
    text = free.outputs[0].text
    stop = next(text[at : at + 2] for at in range(1, len(text) - 2) if "\ufffd" not in text[at : at + 2])
    (stopped,) = llm.generate("sea", SamplingParams(**params, stop=["never there", stop]))
    (output,) = stopped.outputs
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == free.outputs[0].token_ids[: len(output.token_ids)]


def test_stop_tokens_and_the_end_of_text(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (free,) = llm.generate("sea", DRAWN)
    chosen = free.outputs[0].token_ids
    ending = chosen[5]
    expected = chosen[: chosen.index(ending) + 1]
    (by_id,) = llm.generate(
        "sea", SamplingParams(temperature=1, max_tokens=12, ignore_eos=True, seed=1234, stop_token_ids=[ending])
    )
    assert by_id.outputs[0].token_ids == expected
    assert (by_id.outputs[0].finish_reason, by_id.outputs[0].stop_reason) == ("stop", ending)

    monkeypatch.setitem(llm.generation_config, "eos_token_id", [END, ending])
    (ended,) = llm.generate("sea", SamplingParams(temperature=1, max_tokens=12, seed=1234))
    ends = next(place for place, token in enumerate(chosen) if token in (END, ending))
    assert ended.outputs[0].token_ids == chosen[: ends + 1]
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", None)
    assert token_ids(llm.generate("sea", DRAWN)) == [chosen]  # ignore_eos


def test_nothing_stops_before_min_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (free,) = llm.generate("sea", GREEDY)
    ending = free.outputs[0].token_ids[0]
    monkeypatch.setitem(llm.generation_config, "eos_token_id", ending)
    for stop in ({}, {"stop_token_ids": [ending], "ignore_eos": True}):
        (output,) = llm.generate("sea", SamplingParams(temperature=0, max_tokens=20, min_tokens=6, **stop))
        found = output.outputs[0].token_ids
        assert len(found) >= 6
        assert ending not in found[:6]


def test_logprobs_are_the_models(llm: LLM) -> None:
    (prompt,) = random_prompts(1)
    params = [SamplingParams(temperature=0.7, max_tokens=6, ignore_eos=True, seed=5, logprobs=k) for k in (3, 0)]
    three, none = llm.generate([prompt, prompt], params)
    (output,) = three.outputs
    logits = llm.logits(prompt + output.token_ids[:-1])[len(prompt) - 1 :].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    assert output.logprobs is not None
    for place, row, chosen in zip(output.logprobs, expected, output.token_ids, strict=True):
        best = np.argsort(-row)[:3].tolist()
        assert set(place) == {*best, chosen}
        for token, found in place.items():
            assert found.logprob == pytest.approx(row[token], abs=1e-4)
            assert found.rank == 1 + int((row > row[token]).sum())
            assert found.decoded_token is not None
    pieces = [place[token].decoded_token or "" for place, token in zip(output.logprobs, output.token_ids, strict=True)]
    assert "".join(pieces) == output.text  # a token may be a part of a character
    total = sum(row[chosen] for row, chosen in zip(expected, output.token_ids, strict=True))
    assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert none.outputs[0].logprobs is not None
    assert [list(place) for place in none.outputs[0].logprobs] == [[token] for token in none.outputs[0].token_ids]


def test_biased_tokens_come_always_or_never_whoever_is_beside_them(llm: LLM) -> None:
    wanted, other = VOCAB_SIZE - 1, VOCAB_SIZE - 2
    (plain,) = llm.generate("sea", replace(GREEDY, ignore_eos=True, logprobs=2))
    unwanted = plain.outputs[0].token_ids[0]
    kept = replace(GREEDY, ignore_eos=True)
    params = [
        replace(kept, logit_bias={wanted: 100}),
        replace(kept, logit_bias={unwanted: -100}, logprobs=2),
        replace(kept, temperature=2, seed=3, logit_bias={**dict.fromkeys(range(9), 0.5), wanted: 100, other: 100}),
        kept,
    ]
    outputs = llm.generate(["sea"] * 4, params)
    forced, without, drawn, beside = [output.outputs[0].token_ids for output in outputs]
    assert set(forced) == {wanted} and unwanted not in without and set(drawn) <= {wanted, other} and len(drawn) == 12
    assert beside == plain.outputs[0].token_ids
    (places, first) = (output.outputs[0].logprobs for output in (outputs[1], plain))
    assert (
        places is not None and first is not None and places[0][unwanted].logprob == first[0][unwanted].logprob
    )  # the model's own
    for number, one in enumerate(params):
        assert llm.generate("sea", one)[0].outputs[0].token_ids == outputs[number].outputs[0].token_ids
    with pytest.raises(InflashError, match=r"logit_bias: token ids should be from 0 to 257, found 258"):
        llm.generate("sea", replace(GREEDY, logit_bias={VOCAB_SIZE: 1}))


def test_texts_end_where_the_positions_end(llm: LLM) -> None:
    assert llm.max_model_len == 64
    (output,) = llm.generate([random_prompts(1)[0][:1] * 60], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4
    assert output.outputs[0].finish_reason == "length"


def test_results_come_as_they_finish(llm: LLM) -> None:
    lengths = [9, 2, 5]
    requests = [
        llm.make_request(f"r{n}", "sea", SamplingParams(temperature=0, max_tokens=n, ignore_eos=True), number)
        for number, n in enumerate(lengths)
    ]
    steps: list[int] = []
    assert [output.request_id for output in llm.stream(requests, steps.append)] == ["r2", "r5", "r9"]
    assert sum(steps) == sum(lengths)


def test_metrics_are_in_order(llm: LLM) -> None:
    outputs = llm.generate(random_prompts(6), GREEDY)
    for output in outputs:
        metrics = output.metrics
        assert metrics is not None and metrics.time_in_queue is not None and metrics.first_token_time is not None
        assert metrics.first_scheduled_time is not None and metrics.finished_time is not None
        assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time < metrics.finished_time


def test_a_second_call_compiles_nothing(llm: LLM) -> None:
    params = [GREEDY, DRAWN, SamplingParams(temperature=1, top_k=3, max_tokens=12), replace(GREEDY, logit_bias={5: 1})]
    llm.generate(random_prompts(4), params)
    before = num_compilations()
    for _ in range(3):
        llm.generate(random_prompts(4, longest=50), params)
    assert num_compilations() == before


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: expected some text, found an empty string; {'prompt': None} begins a new document"),
        ({"prompt_token_ids": []}, "prompt: expected at least one token, found none"),
        ([[]], "prompt: expected at least one token, found none"),
        ([VOCAB_SIZE], "prompt: token ids should be from 0 to 257, found 258"),
        ([3, -1], "prompt: token ids should be from 0 to 257, found -1"),
        ([5] * 64, r"prompt: at most 63 tokens fit \(the limit is 64, one is for the answer\), found 64"),
        ({"text": "sea"}, r"prompt: expected one of 'prompt', 'prompt_token_ids', 'messages', found the keys \['text'\]"),
        ({"prompt": "a", "prompt_token_ids": [3]}, "prompt: expected one of"),
        ({"prompt_token_ids": [1.5]}, "prompt: expected a text or a list of token ids, found 1.5 in a list"),
        (None, "prompt: expected a text or a list of token ids, found None"),
        ([[True, 3]], "prompt: expected a text or a list of token ids"),
    ],
)
def test_prompts_that_cannot_be(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InflashError, match=message):
        llm.generate(prompt, GREEDY)


def test_as_many_params_as_prompts(llm: LLM) -> None:
    with pytest.raises(InflashError, match="sampling_params: expected one, or 2 like the prompts, found 3"):
        llm.generate(["a", "b"], [GREEDY] * 3)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one token"),
        ([VOCAB_SIZE], "token ids should be"),
        ([[3, 4]], "shape"),
        ([0.5], "float64"),
        ([3] * 65, "found 65"),
    ],
)
def test_logits_of_what_cannot_be(llm: LLM, ids: Any, message: str) -> None:
    with pytest.raises(InflashError, match=message):
        llm.logits(ids)


def test_logits_of_the_longest_text(llm: LLM) -> None:
    assert llm.logits([3] * 64).shape == (64, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 65}, "max_model_len: the model has 64 positions, found 65"),
        ({"loaders": 0}, "loaders should be a positive integer, found 0"),
        ({"predictor": "nobody"}, "predictor should be one of"),
    ],
)
def test_options_that_cannot_be(store: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InflashError, match=message):
        LLM(store.path, **options)


def test_a_missing_store(tmp_path: Path) -> None:
    with pytest.raises(InflashError, match="expected an inflash store, found no store"):
        LLM(str(tmp_path / "nothing"))


def test_a_shorter_limit_than_the_models(store: Store) -> None:
    with LLM(store.path, predictor="exact", max_model_len=16, max_num_seqs=1, queue_depth=1) as llm:
        (output,) = llm.generate("0123456789", GREEDY)
        assert len(output.outputs[0].token_ids) == 6
        with pytest.raises(InflashError, match="at most 15 tokens fit"):
            llm.generate("0123456789abcdef", GREEDY)
        llm.close()
        llm.close()
        with pytest.raises(InflashError, match="this model was closed"):
            llm.generate("again", GREEDY)
        with pytest.raises(InflashError, match="this model was closed"):
            llm.logits([FIRST_BYTE])


def test_its_arguments_are_the_engines_options() -> None:
    parameters = [p for p in inspect.signature(LLM).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    options = {field.name: field.default for field in fields(EngineOptions)}
    assert {p.name: p.default for p in parameters} == options


def test_logits_of_whole_texts_again_and_again(tmp_path: Path) -> None:
    """Positions that are no power of two: the KV cache holds more than the model may use."""
    store = make_store(tmp_path, num_hidden_layers=1, max_position_embeddings=50)
    with LLM(store.path, ffn="resident", queue_depth=1, max_num_seqs=1) as llm:
        text = np.random.default_rng().integers(0, store.config.vocab_size, 50).tolist()
        np.testing.assert_array_equal(llm.logits(text), llm.logits(text))


def test_a_model_that_computes_nonsense_says_so(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_opt_checkpoint(checkpoint, num_hidden_layers=1)
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.decoder.layers.0.fc1.bias"][:] = np.inf
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.warns(UserWarning, match="up_bias: contains NaN or infinite weights"):
        store = convert_quietly(checkpoint, tmp_path / "store")
    with LLM(store.path, ffn="resident", queue_depth=1, max_num_seqs=1) as llm:
        with pytest.raises(RunError, match="prompt 0: the model's scores are NaN or infinite"):
            llm.generate([[5, 6]], GREEDY)
        with pytest.raises(InflashError, match="stop_token_ids: should be from 0 to"):
            llm.generate([[5, 6]], SamplingParams(stop_token_ids=[10**6]))


def test_a_loader_killed_while_generating_ends_the_call(store: Store) -> None:
    with LLM(store.path, predictor="exact", cache_neurons=0.1, max_num_seqs=1, loaders=2, queue_depth=1) as llm:
        killed: list[float] = []

        def kill_once(_: int) -> None:
            if not killed:
                os.kill(llm.engine.pool.process_ids[1], signal.SIGKILL)
                killed.append(time.monotonic())

        request = llm.make_request("r", "sea", SamplingParams(temperature=1, max_tokens=60, ignore_eos=True), 0)
        with pytest.raises(RunError, match="ended unexpectedly"):
            list(llm.stream([request], kill_once))
        assert time.monotonic() - killed[0] < 5


def test_a_store_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    """It is a golden one, so `logits` can be compared with transformers."""
    write_golden_checkpoint(tmp_path / "checkpoint", "untied")
    store = convert_quietly(tmp_path / "checkpoint", tmp_path / "store", predictor_rank=0)
    with LLM(store.path, ffn="hybrid", max_num_seqs=1, queue_depth=1) as llm:
        for ids, expected in golden_prompts("untied"):
            np.testing.assert_allclose(llm.logits(ids), expected, rtol=0, atol=1e-4)
        with pytest.raises(InflashError, match="this store has no tokenizer; give token ids"):
            llm.generate("sea", GREEDY)
        with pytest.raises(InflashError, match="stop: strings need a tokenizer"):
            llm.generate([5, 6], SamplingParams(stop="x"))
        (output,) = llm.generate([5, 6], GREEDY)
        assert output.outputs[0].text == ""
        assert len(output.outputs[0].token_ids) == 12


def test_defaults_are_the_models_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llm.generation_config, "max_new_tokens", 3)
    monkeypatch.setitem(llm.generation_config, "temperature", 0.0)
    (output,) = llm.generate("sea")
    (greedy,) = llm.generate("sea", SamplingParams(temperature=0, max_tokens=3))
    assert output.outputs == greedy.outputs


OTHER_DEVICE = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
first, other = jax.devices("cpu")
jax.config.update("jax_default_device", other)
from inflash import LLM, SamplingParams
with LLM(sys.argv[1], predictor="exact", max_num_seqs=4, queue_depth=2) as llm:
    outputs = llm.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2))
    assert all(array.devices() == {first} for array in jax.live_arrays()), {array.devices() for array in jax.live_arrays()}
print(json.dumps([output.outputs[0].token_ids for output in outputs]))
"""


def test_all_is_computed_on_the_cpu_whatever_jax_prefers(llm: LLM) -> None:
    """Where JAX finds a GPU, that is its default device, and what is not put elsewhere goes there."""
    prompts = random_prompts(5)
    command = [sys.executable, "-c", OTHER_DEVICE, llm.engine.store.path, json.dumps(prompts)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == token_ids(llm.generate(prompts, GREEDY))


def test_the_face_is_the_same() -> None:
    assert inflash.LLM is LLM
    assert inflash.SamplingParams is SamplingParams


def test_many_requests_are_made_as_each_alone(store: Store) -> None:
    prompts: list[Any] = ["sea", "", [FIRST_BYTE] * 3, "the sea", "x" * 5000, {"prompt": "sea"}, [VOCAB_SIZE], {}, "ünder", "sea"]
    with LLM(store.path, max_num_seqs=1) as llm:
        asked = [(f"r{number}", prompt, GREEDY, number) for number, prompt in enumerate(prompts)]
        made = list(llm.make_requests(asked))
        for one, found in zip(asked, made, strict=True):
            if isinstance(found, InflashError):
                with pytest.raises(InflashError, match=re.escape(str(found))):
                    llm.make_request(*one)
            else:
                assert found == llm.make_request(*one)
        assert [number for number, found in enumerate(made) if isinstance(found, InflashError)] == [1, 4, 6, 7]
        chat = {"messages": [{"role": "user", "content": "sea"}]}
        with pytest.raises(ChatTemplateError):  # the model has no template, for no chat
            list(llm.make_requests((f"r{number}", chat, GREEDY, number) for number in range(3)))
