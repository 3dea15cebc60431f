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


@pytest.mark.parametrize("options", [{}, {"predictor": "exact"}], ids=["anything", "cached"])
def test_texts_are_the_dense_model_s_at_every_budget(store: Store, dense: list[list[int]], options: dict[str, Any]) -> None:
    smallest = least(store, **options)
    kinds = set()
    for more in (0, 400 << 10, 4 << 20):
        with LLM(store.path, memory=smallest + more, **options) as llm:
            assert texts(llm) == dense
            assert llm.planned is not None and llm.planned.used_bytes <= smallest + more
            kinds.add((llm.planned.plan.ffn, llm.planned.plan.slots, llm.planned.plan.streamed_attention))
            assert llm.run_summary()["predicted"]["total_ms"] > 0
    assert len(kinds) == 3


def test_a_budget_below_the_least_says_the_least(store: Store) -> None:
    smallest = least(store)
    with LLM(store.path, memory=smallest - 1) as llm, pytest.raises(InflashError) as error:
        llm.generate(PROMPTS * 2, GREEDY)
    assert "need at least" in str(error.value)
    with pytest.raises(InflashError, match="need at least .* give more memory"):
        LLM(store.path, memory=1 << 20)


def test_fewer_sequences_where_not_all_fit(store: Store, dense: list[list[int]]) -> None:
    planner = Planner(store, EngineOptions(), assumed_device(), assumed_curves(store))
    with LLM(store.path, memory=planner.least_bytes(1, 28)) as llm:
        assert texts(llm) == dense
        assert llm.planned is not None and llm.planned.num_seqs == 1


def test_longer_requests_are_planned_for_when_they_come(store: Store, dense: list[list[int]]) -> None:
    with LLM(store.path, memory="auto", predictor="exact") as llm:
        assert texts(llm) == dense
        before = llm.engine
        assert llm.generate([PROMPTS[0]], SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
        assert llm.engine is not before
        assert texts(llm) == dense
        assert llm.planned is not None and llm.planned.max_length == 204


def test_slots_move_to_where_more_is_missed(store: Store, dense: list[list[int]]) -> None:
    """The curves say that all layers are alike; a run that shows another picture changes the split, and nothing else."""
    with LLM(store.path, memory=least(store, predictor="exact") + (300 << 10), predictor="exact") as llm:
        assert texts(llm) == dense
        cached = llm.engine.neurons.cached
        assert cached is not None
        before, cached.missed[1] = dict(cached.slots), cached.missed[1] + 40 * 256
        assert texts(llm) == dense
        assert cached.slots[1] > before[1] and sum(cached.slots.values()) <= sum(before.values())
        assert texts(llm) == dense
