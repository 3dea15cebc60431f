"""Predicted neurons by slot or all of them in order: the same sums, for every sequence, whoever shares the batch."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compilations import num_compilations
from decoding import teacher_forced
from synthetic_stores import synthetic_store
from tiny_models import BUFFERED

from inflash.pipeline.engine import Engine
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.path_choice import PathChoice
from inflash.pipeline.plan import BLOCK_BUFFERS, CACHED, STREAMED, plan_from_options
from inflash.storage.store import Store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

NUM_SEQS, LENGTH = 11, 32  # more sequences than kernels for few serve
TEXTS = list(np.random.default_rng().integers(4, 512, (NUM_SEQS, LENGTH)).astype(np.int32))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(tmp_path_factory.mktemp("planted") / "store", num_layers=2)


def open_engine(store: Store, **options: Any) -> Engine:
    return Engine(store, EngineOptions(**{"loaders": 1, "cache_neurons": 0.25, "compute_dtype": "float32", **options}))


def decode(store: Store, texts: list[np.ndarray] = TEXTS, **options: Any) -> tuple[list[np.ndarray], Engine]:
    with open_engine(store, **options) as engine:
        engine.prepare(len(texts), 64)
        return teacher_forced(engine, texts, [8] * len(texts)), engine


@pytest.fixture(scope="module")
def sparse(store: Store) -> tuple[list[np.ndarray], Engine]:
    return decode(store, path="sparse")


def test_both_ways_give_the_same(store: Store, sparse: tuple[list[np.ndarray], Engine]) -> None:
    found, engine = decode(store, path="dense")
    np.testing.assert_allclose(found, sparse[0], rtol=0, atol=1e-4)
    steps = LENGTH - 8
    assert (engine.times.dense_layers, engine.times.sparse_layers) == (2 * steps, 0)
    assert (sparse[1].times.dense_layers, sparse[1].times.sparse_layers) == (0, 2 * steps)
    assert engine.times.summary()["dense_share"] == 1 and engine.times.misses == engine.times.prefetched == 0


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_a_sequence_alone_gives_what_it_gives_in_company(
    store: Store, sparse: tuple[list[np.ndarray], Engine], path: str
) -> None:
    """With a predictor that is sometimes wrong: a neuron that only others name adds nothing."""
    (alone,), _ = decode(store, TEXTS[3:4], path=path)
    np.testing.assert_allclose(alone, sparse[0][3], rtol=0, atol=1e-4)


def test_the_way_may_change_from_step_to_step(
    store: Store, sparse: tuple[list[np.ndarray], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards nothing has been compiled, and no step differs."""
    order = itertools.cycle([frozenset(), frozenset({0, 1}), frozenset({1}), frozenset({0, 1})])
    monkeypatch.setattr(PathChoice, "next_step", lambda choice: setattr(choice, "dense", next(order)))
    with open_engine(store) as engine:
        engine.prepare(NUM_SEQS, 64)
        before = num_compilations()
        engine.process_prompts([(row, text[:8]) for row, text in enumerate(TEXTS)])
        for position in range(8, LENGTH):
            tokens = np.asarray([text[position] for text in TEXTS], np.int32)
            logits = engine.decode(tokens, np.full(NUM_SEQS, position, np.int32), np.ones(NUM_SEQS, bool))
            np.testing.assert_allclose(logits, [text[position - 7] for text in sparse[0]], rtol=0, atol=1e-4)
        assert num_compilations() == before
        assert (engine.times.sparse_layers, engine.times.dense_layers) == (20, 28)


def test_a_layer_may_have_got_more_slots_than_any_had(store: Store, sparse: tuple[list[np.ndarray], Engine]) -> None:
    """The rates that a choice begins with are timed with the slots of the first layer."""
    with open_engine(store) as engine:
        assert engine.neurons.cached is not None
        engine.neurons.cached.resize({0: 400, 1: 112})
        engine.prepare(NUM_SEQS, 64)
        for found, expected in zip(teacher_forced(engine, TEXTS, [8] * NUM_SEQS), sparse[0], strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_what_a_choice_streamed_is_forgotten_with_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence after two: a step reads the streamed layer, and not the cached one, which the two read in order."""
    monkeypatch.setattr(PathChoice, "next_step", lambda choice: setattr(choice, "dense", frozenset({0})))
    options = EngineOptions(loaders=1, cache_neurons=0.25, compute_dtype="float32")
    plan = replace(plan_from_options(store, options), ffn=(CACHED, STREAMED), slots=(256, 0), prefetch=None)
    with Engine(store, options, plan=plan) as engine:
        engine.prepare(2, 64)
        teacher_forced(engine, [text[:10] for text in TEXTS[:2]], [8, 8])
        assert engine.times.dense_layers == 1
        engine.prepare(1, 64)
        teacher_forced(engine, [TEXTS[0][:10]], [8])
        asked, missed = engine.pool.bytes_requested, engine.times.misses
        for position in range(10, 26):
            engine.decode(TEXTS[0][position : position + 1], np.array([position], np.int32), np.ones(1, bool))
        streamed = engine.pool.bytes_requested - asked - (engine.times.misses - missed) * store.bundles.bundle_bytes
        assert streamed <= (16 + BLOCK_BUFFERS) * store.bundles.layer_bytes


def test_one_sequence_and_other_policies_have_no_choice(store: Store) -> None:
    with open_engine(store) as engine:
        engine.prepare(1, 64)
        assert engine.neurons.choice is None
    with open_engine(store, policy="lru") as engine:
        engine.prepare(2, 64)
        assert engine.neurons.choice is None
