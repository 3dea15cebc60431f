"""Memory for keys and values: shared by what begins alike, which no answer shows, and limited."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import BUFFERED, DIRECT, make_store

from inflash import LLM, InflashError, SamplingParams
from inflash.pipeline import host_memory, memory_parts
from inflash.pipeline.memory_parts import kv_cache_bytes
from inflash.pipeline.run_size import RunSize
from inflash.storage.store import Store

pytestmark = pytest.mark.filterwarnings(BUFFERED)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("model"), **DIRECT)


def test_shared_beginnings_are_computed_once_and_change_no_answer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng()
    beginning = rng.integers(3, store.config.vocab_size, 70).tolist()
    prompts = [beginning + rng.integers(3, store.config.vocab_size, more).tolist() for more in (1, 20, 7, 40)]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    with LLM(store.path, ffn="resident", compute_dtype="float32", max_num_seqs=2, queue_depth=1) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(memory_parts, "available_bytes", lambda: kv_cache_bytes(store, 128))
            one_by_one = llm.generate(prompts, params)
        assert llm.engine.num_seqs == 2 and llm.engine.kv_cache.num_positions == 128
        requests = [llm.make_request(str(number), prompt, params, number) for number, prompt in enumerate(prompts)]
        size = RunSize.of(requests)
        alone = [next(llm.stream([request], size=size)).outputs[0].token_ids for request in requests]
        assert llm.engine.kv_cache.num_positions == 256
        assert [output.outputs[0].token_ids for output in one_by_one] == alone
        before = llm.times.copy()
        together = llm.generate(prompts, params)
        assert [output.outputs[0].token_ids for output in together] == alone
        assert [output.num_cached_tokens for output in together] == [0, 64, 64, 64]
        assert llm.times.cached_tokens - before.cached_tokens == 3 * 64  # two full blocks each
        assert llm.times.prompt_tokens - before.prompt_tokens == sum(map(len, prompts)) - 3 * 64
        (several,) = llm.generate([prompts[3]], replace(params, n=3))
        assert [completion.token_ids for completion in several.outputs] == [alone[3]] * 3
        assert several.num_cached_tokens == 0
        assert llm.times.cached_tokens - before.cached_tokens == 3 * 64 + 2 * 96


def test_the_longest_sequence_that_memory_has_room_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(store.path, ffn="hybrid", queue_depth=1) as llm:
        assert llm.longest_fitting(300) == 300
        assert llm.longest_fitting(1 << 20) == llm.max_model_len
        monkeypatch.setattr(host_memory, "available_bytes", lambda: kv_cache_bytes(store, 128))
        assert [llm.longest_fitting(length) for length in (100, 128, 129, 300)] == [100, 128, 128, 128]
        monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
        with pytest.raises(InflashError, match=r"memory: this run needs .*KV cache of 64 tokens"):
            llm.longest_fitting(100)
