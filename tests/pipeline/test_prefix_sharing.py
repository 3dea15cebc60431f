"""Prompts that begin alike share blocks of the KV cache, and nobody's answer shows it."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import BUFFERED, DIRECT, make_store

from inflash.pipeline.llm import LLM
from inflash.pipeline.sampling_params import SamplingParams

pytestmark = pytest.mark.filterwarnings(BUFFERED)


def test_shared_beginnings_are_computed_once_and_change_no_answer(tmp_path: Path) -> None:
    store = make_store(tmp_path, **DIRECT)
    rng = np.random.default_rng()
    beginning = rng.integers(3, store.config.vocab_size, 70).tolist()
    prompts = [beginning + rng.integers(3, store.config.vocab_size, more).tolist() for more in (1, 20, 7, 40)]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    with LLM(store.path, ffn="resident", compute_dtype="float32", max_num_seqs=2, queue_depth=1) as llm:
        alone = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
        before = llm.times.copy()
        together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        assert together == alone
        assert llm.times.cached_tokens - before.cached_tokens == 3 * 64  # two full blocks each
        assert llm.times.prompt_tokens - before.prompt_tokens == sum(map(len, prompts)) - 3 * 64
