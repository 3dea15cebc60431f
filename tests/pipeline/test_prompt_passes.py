"""Prompts in passes: in an order in which nobody reads what is not written, beside decoding, and without a trace in the answers."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BUFFERED, DIRECT, fresh_seed, make_store, model_config

from inflash import LLM, SamplingParams
from inflash.errors import InflashError
from inflash.kernels.decoder_layer import LayerShape
from inflash.pipeline.block_pool import BLOCK_SIZE
from inflash.pipeline.chunks import num_tokens
from inflash.pipeline.engine import Engine
from inflash.pipeline.kv_cache import KVCache
from inflash.pipeline.prompt_passes import PromptPasses
from inflash.pipeline.requests import Continuation, Request, RequestProgress
from inflash.pipeline.run_size import RunSize

pytestmark = pytest.mark.filterwarnings(BUFFERED)

SHAPE = LayerShape(num_heads=1, norm_first=True, norm_epsilon=1e-5, compute_dtype="float32")
MAX_LENGTH = 192
prompts = st.tuples(st.integers(0, 2), st.sampled_from([1, 3, 31, 32, 33, 70, 128, 170]), st.integers(1, 20))
"""How many blocks of a common text it begins with, its length, and how much follows."""


def continuation(number: int, token_ids: list[int], max_tokens: int) -> Continuation:
    params = SamplingParams(max_tokens=max_tokens)
    request = Request(request_id="", prompt=None, prompt_token_ids=token_ids, sampling_params=params, number=number)
    (one,) = RequestProgress(request, max_length=MAX_LENGTH, end_ids=frozenset(), token_bytes=None).continuations
    return one


@given(st.lists(prompts, min_size=1, max_size=12), st.sampled_from([20, 64, 100, 1024]), st.data())
def test_whoever_shares_a_block_comes_after_it_is_written(
    lengths: list[tuple[int, int, int]], most: int, data: st.DataObject
) -> None:
    cache = KVCache(model_config(), SHAPE, 3, MAX_LENGTH, num_blocks=10, num_layers=0)
    cache.clear()
    waiting = deque[Continuation]()
    for number, (shared, length, more) in enumerate(lengths):
        token_ids = np.full(length, 100 + number)
        token_ids[: shared * BLOCK_SIZE] = 7
        waiting.append(continuation(number, token_ids.tolist(), more))
    order = list(waiting)
    slots: list[Continuation | None] = [None] * 3
    passes, begun, complete, written = PromptPasses(cache, most), [], [], {}
    while waiting or any(slots):
        parts = passes.next_pass(slots, waiting)
        num_tokens = 0
        for part in parts:
            assert slots[part.row] is part.continuation and part.continuation not in complete
            start, end = cache.num_cached[part.row], len(part.token_ids)
            assert start < end and (part.is_last or (end - start) % BLOCK_SIZE == 0)
            num_tokens += end - start
            table = cache.tables()[part.row]
            assert [written[table[at // BLOCK_SIZE], at % BLOCK_SIZE] for at in range(start)] == part.token_ids[:start].tolist()
            written |= {(table[at // BLOCK_SIZE], at % BLOCK_SIZE): part.token_ids[at] for at in range(start, end)}
            if part.continuation not in begun:
                begun.append(part.continuation)
            if part.is_last:
                complete.append(part.continuation)
        assert num_tokens <= max(most, BLOCK_SIZE)
        assert parts or any(c in complete for c in slots)  # otherwise nothing would ever happen again
        for row, occupant in enumerate(slots):
            if occupant in complete and (not parts or data.draw(st.booleans())):
                slots[row] = None
                cache.release(row)
    assert begun == order and len(complete) == len(order)


def test_a_pass_waits_until_idle_slots_have_cost_half_a_step() -> None:
    cache = KVCache(model_config(), SHAPE, 8, MAX_LENGTH, num_layers=0)
    cache.clear()
    waiting = deque(continuation(number, [5] * (3 + number), 4) for number in range(13))
    slots: list[Continuation | None] = [None] * 8
    passes = PromptPasses(cache, 1024)
    assert len(passes.next_pass(slots, waiting)) == 8  # nobody decodes: at once

    def begun(*ended: int) -> list[int]:
        for row in ended:
            cache.release(row)
            slots[row] = None
        return [part.row for part in passes.next_pass(slots, waiting)]

    assert [begun(3), begun(), begun(), begun()] == [[], [], [], [3]]  # 1 + 1 + 1 + 1 of 8 slots
    assert [begun(0), begun(5, 6)] == [[], [0, 5, 6]]  # 1 + 3
    assert begun(*range(8)) == [0]  # the last one, and nobody decodes


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    store = make_store(tmp_path_factory.mktemp("model"), **DIRECT)
    with LLM(store.path, ffn="resident", compute_dtype="float32", max_num_seqs=2, queue_depth=1) as llm:
        yield llm


class Watched:
    """Notes an engine's passes, by their tokens, and its steps, by their sequences, while it works."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        run_chunks, decode = engine._run_chunks, engine.decode

        def watched_chunks(chunks: Any, **options: Any) -> Any:
            self.events.append(("pass", num_tokens(chunks)))
            return run_chunks(chunks, **options)

        def watched_decode(token_ids: np.ndarray, positions: np.ndarray, active: np.ndarray) -> Any:
            self.events.append(("step", int(active.sum())))
            return decode(token_ids, positions, active)

        monkeypatch.setattr(engine, "_run_chunks", watched_chunks)
        monkeypatch.setattr(engine, "decode", watched_decode)


def test_decoding_goes_on_between_the_passes_of_a_long_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(fresh_seed())
    lengths = [5, 180, 200]
    tokens = [rng.integers(3, llm.config.vocab_size, length).tolist() for length in lengths]
    tokens[2][:96] = tokens[1][:96]
    params = [SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True) for count in (7, 4, 6)]
    whole = llm.generate(tokens, params)
    monkeypatch.setattr(llm.engine, "plan", replace(llm.engine.plan, prompt_tokens=64))
    events = Watched(llm.engine, monkeypatch).events
    before = llm.times.copy()
    cut = llm.generate(tokens, params)
    assert [output.outputs[0].token_ids for output in cut] == [output.outputs[0].token_ids for output in whole]
    assert [output.num_cached_tokens for output in cut] == [0, 0, 96]
    assert llm.times.cached_tokens - before.cached_tokens == 96
    assert events[:6] == [("pass", 5 + 32), ("step", 1), ("pass", 64), ("step", 1), ("pass", 64), ("step", 1)]
    assert events[6:8] == [("pass", 20), ("step", 2)]
    assert [count for kind, count in events[8:] if kind == "pass"] == [64, 40]
    assert sum(count for kind, count in events if kind == "step") == 6 + 3 + 5


def test_a_request_longer_than_the_size_says_is_told(llm: LLM) -> None:
    """It would wait for blocks for ever, or have more than its table has room for."""
    params = [SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True) for count in (40, 95)]
    short, long = (llm.make_request(f"of {one.max_tokens}", [9] * 5, one, number) for number, one in enumerate(params))
    for together in (1, 2):
        outputs = llm.stream([long], size=RunSize.of([short] * together))
        with pytest.raises(InflashError, match="request of 95: needs 100 positions of the KV cache, found 64; give `size`"):
            next(outputs)


def test_the_logits_of_a_long_text_come_in_passes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = np.random.default_rng(fresh_seed()).integers(3, llm.config.vocab_size, 190)
    whole = llm.logits(text)
    monkeypatch.setattr(llm.engine, "plan", replace(llm.engine.plan, prompt_tokens=190))
    events = Watched(llm.engine, monkeypatch).events
    np.testing.assert_array_equal(llm.logits(text), whole)
    monkeypatch.setattr(llm.engine, "plan", replace(llm.engine.plan, prompt_tokens=64))
    np.testing.assert_array_equal(llm.logits(text), whole)
    assert events == [("pass", 190), ("pass", 64), ("pass", 64), ("pass", 62)]
