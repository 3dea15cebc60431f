"""Any plan computes the same: layers by different ways, attention and head in memory or not."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from decoding import teacher_forced
from opt_reference import canonical_tensors, forward
from tiny_models import BUFFERED, DIRECT, make_store

from inflash.pipeline.engine import Engine
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.plan import CACHED, RESIDENT, STREAMED, Plan, plan_from_options
from inflash.storage.checkpoint import open_source
from inflash.storage.store import Store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

TOLERANCE = 2e-4  # float32 against float64
OPTIONS = EngineOptions(predictor="exact", loaders=1, queue_depth=4, max_num_seqs=2, max_model_len=64)
MIXED: dict[str, Any] = {"ffn": (CACHED, STREAMED, RESIDENT, CACHED), "slots": (40, 0, 256, 130)}
PLANS: dict[str, dict[str, Any]] = {
    "attention of some layers streamed": {"streamed_qkv": (True, False, True, False), "streamed_out": (True, False, True, False)},
    "one matrix of some layers, both of others": {"streamed_qkv": (False, False, True, True), "streamed_out": (True, False, True, False)},
    "output projections and the head streamed": {"streamed_out": (True,) * 4, "streamed_head": True, "block_buffers": 2},
    "only the head streamed": {"streamed_head": True},
    "a way for each layer, the head streamed": {**MIXED, "streamed_head": True, "block_bytes": 30 << 10},
    "some layers streamed": {"ffn": (STREAMED, CACHED, STREAMED, CACHED), "slots": (0, 64, 0, 200), "block_bytes": 50 << 10},
    "no prediction": {
        "ffn": (STREAMED, RESIDENT, RESIDENT, STREAMED), "slots": (0, 256, 256, 0), "predictor": None,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("model"), **{**DIRECT, "num_hidden_layers": 4})


@pytest.fixture(scope="module")
def texts(store: Store) -> list[np.ndarray]:
    return [np.random.default_rng().integers(3, store.config.vocab_size, length).astype(np.int32) for length in (40, 30)]


@pytest.fixture(scope="module")
def expected(store: Store, texts: list[np.ndarray]) -> list[np.ndarray]:
    with open_source(store.path.parent / "checkpoint") as source:
        tensors = canonical_tensors(source)
    return [forward(tensors, store.config, text) for text in texts]


def plan(store: Store, **changes: Any) -> Plan:
    return replace(plan_from_options(store, OPTIONS), **changes)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_gives_the_same_logits(store: Store, texts, expected, name: str) -> None:
    with Engine(store, OPTIONS, plan=plan(store, **PLANS[name])) as engine:
        engine.prepare(2, 64)
        for _ in range(2):  # what was read ahead for a step is not what the next prompt needs
            for found, whole, prompt in zip(teacher_forced(engine, texts, [20, 7]), expected, [20, 7], strict=True):
                np.testing.assert_allclose(found, whole[prompt - 1 :], rtol=0, atol=TOLERANCE)


def test_slots_move_from_layer_to_layer(store: Store, texts, expected) -> None:
    with Engine(store, OPTIONS, plan=plan(store, slots=(150,) * 4)) as engine:
        engine.prepare(2, 64)
        cached = engine.neurons.cached
        assert cached is not None
        for slots in ((150,) * 4, (20, 256, 200, 124), (256, 3, 256, 40)):
            cached.resize(dict(enumerate(slots)))
            for found, whole, prompt in zip(teacher_forced(engine, texts, [20, 7]), expected, [20, 7], strict=True):
                np.testing.assert_allclose(found, whole[prompt - 1 :], rtol=0, atol=TOLERANCE)
