"""A memory budget in place of flags: what is planned runs, whatever it is, and says the same as the dense model."""

from typing import Any

import pytest
from tiny_models import BUFFERED, DIRECT, make_store

from inflash import LLM, SamplingParams
from inflash.errors import InflashError
from inflash.pipeline.device import assumed_device
from inflash.pipeline.hit_curves import assumed_curves
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.planner import Planner
from inflash.storage.store import Store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

PROMPTS = [[5, 9, 70, 30], [8, 8, 40]]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("model"), **{**DIRECT, "num_hidden_layers": 3})


@pytest.fixture(scope="module")
def dense(store: Store) -> list[list[int]]:
    with LLM(store.path, ffn="resident") as llm:
        return texts(llm)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def texts(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def least(store: Store, **options: Any) -> int:
    planner = Planner(store, EngineOptions(**options), assumed_device(), assumed_curves(store))
    return planner.least_bytes(2, 28)


def test_texts_are_the_dense_model_s_at_every_budget(store: Store, dense: list[list[int]]) -> None:
    """The larger budget's slots then move to where more is missed than the curves say, which are alike for all layers."""
    smallest, seen = least(store, predictor="exact"), set()
    for more in (0, 300 << 10):
        with LLM(store.path, memory=smallest + more, predictor="exact") as llm:
            assert texts(llm) == dense
            assert llm.planned is not None and llm.planned.used_bytes <= smallest + more
            seen.add((llm.planned.plan.slots, llm.planned.plan.streamed_out))
            assert llm.run_summary()["predicted"]["total_ms"] > 0
            cached = llm.engine.neurons.cached
            assert cached is not None
            if more:
                before = dict(cached.slots)
                cached.missed.update({0: 0, 1: 40 * 256, 2: 0})
                assert texts(llm) == dense
                assert cached.slots[1] > before[1] and sum(cached.slots.values()) <= sum(before.values())
                assert texts(llm) == dense
    assert len(seen) == 2


def test_a_budget_below_the_least_says_the_least(store: Store) -> None:
    with pytest.raises(InflashError, match=r"1 x 1 tokens need at least \d+ MiB, found a budget of 1 MiB; give more memory"):
        LLM(store.path, memory=1 << 20)
    with LLM(store.path, memory=least(store)) as llm, pytest.raises(InflashError, match=r"1 x 500 tokens need at least \d+ MiB"):
        llm.generate([PROMPTS[0]], SamplingParams(max_tokens=496, temperature=0))


def test_longer_requests_are_planned_for_when_they_come(store: Store, dense: list[list[int]]) -> None:
    with LLM(store.path, memory="auto", predictor="exact") as llm:
        assert texts(llm) == dense
        before = llm.engine
        assert llm.generate([PROMPTS[0]], SamplingParams(max_tokens=70, temperature=0, ignore_eos=True))
        assert llm.engine is not before
        assert llm.planned is not None and llm.planned.max_length == 74
