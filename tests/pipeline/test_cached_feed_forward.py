"""Reading early, not keeping, not overlapping, not bundling: what is computed stays the same, only what is read changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding import teacher_forced
from synthetic_stores import synthetic_store
from tiny_models import BUFFERED

from inflash.errors import InflashError
from inflash.pipeline.cached_feed_forward import CachedFeedForward
from inflash.pipeline.engine import Engine
from inflash.pipeline.loader_pool import LoaderPool
from inflash.pipeline.options import EngineOptions
from inflash.storage.split_rows import split_rows
from inflash.storage.store import Store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

TOLERANCE = 1e-5  # sums in another order; rounding to bfloat16 after them would make a thousand times as much of some
TEXT = np.random.default_rng().integers(4, 512, 48).astype(np.int32)
PLAIN: dict[str, Any] = {"predictor": "planted", "prefetch": "none", "cache_neurons": 0.25, "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(tmp_path_factory.mktemp("planted") / "store")


def decode(store: Store, *, split: Path | None = None, **options: Any) -> tuple[np.ndarray, Engine]:
    """Logits of the last 32 tokens, and the engine that made them, closed."""
    with Engine(store, EngineOptions(loaders=1, **{**PLAIN, **options}), split_rows=split) as engine:
        engine.prepare(1, 64)
        (found,) = teacher_forced(engine, [TEXT], [16])
    return found, engine


@pytest.fixture(scope="module")
def plain(store: Store) -> tuple[np.ndarray, Engine]:
    return decode(store)


def test_a_guess_moves_reads_before_their_layer(store: Store, plain: tuple[np.ndarray, Engine]) -> None:
    expected, without = plain
    found, engine = decode(store, prefetch="auto")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert engine.plan.prefetch == "planted-ahead" and without.plan.prefetch is None
    assert engine.times.prefetched > 0 == without.times.prefetched
    # Layer 0 has nobody before it; of the others' misses few are left.
    assert engine.times.misses < 0.55 * without.times.misses
    assert engine.times.decode_bytes == (engine.times.misses + engine.times.prefetched) * store.bundles.bundle_bytes
    assert engine.times.decode_bytes < 1.25 * without.times.decode_bytes


@pytest.mark.parametrize("cache", [{"cache_neurons": 0.06}, {"cache_neurons": 0.02}, {"policy": "window", "window": 2}])
def test_a_guess_may_come_late_be_wrong_and_crowd_the_cache(
    store: Store, plain: tuple[np.ndarray, Engine], cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prefetch is ever found finished, and a small cache makes misses take slots that wrong guesses are being read into."""
    monkeypatch.setattr(LoaderPool, "finished", _unless_waiting(LoaderPool.finished))
    found, engine = decode(store, prefetch="planted-ahead", **cache)
    np.testing.assert_allclose(found, plain[0], rtol=0, atol=TOLERANCE)
    assert engine.times.prefetched > 0


def test_prompts_leave_full_caches(store: Store, plain: tuple[np.ndarray, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for every neuron nothing is read after a prompt; with less room, less than by a cache that begins empty."""
    found, engine = decode(store, cache_neurons=1.0)
    np.testing.assert_allclose(found, plain[0], rtol=0, atol=TOLERANCE)
    assert engine.times.misses == engine.times.decode_bytes == 0 < engine.times.hits
    monkeypatch.setattr(CachedFeedForward, "has_room", lambda *_: False)
    found, empty = decode(store)
    np.testing.assert_allclose(found, plain[0], rtol=0, atol=TOLERANCE)
    assert plain[1].times.misses < 0.9 * empty.times.misses


def _unless_waiting(finished: Callable) -> Callable:
    import sys

    def reported(pool: LoaderPool, ticket) -> bool:
        return sys._getframe(1).f_code.co_name in ("wait", "_wait", "_wait_on") and finished(pool, ticket)

    return reported


@pytest.mark.parametrize("options", [{"overlap": False}, {"policy": "none"}, {"merge_gap": 0}, {"merge_gap": 1 << 20}])
def test_parts_that_are_switched_off_change_nothing(
    store: Store, plain: tuple[np.ndarray, Engine], options: dict[str, Any]
) -> None:
    found, engine = decode(store, **options)
    np.testing.assert_allclose(found, plain[0], rtol=0, atol=TOLERANCE)
    times = engine.times
    if options.get("policy") == "none":
        assert times.hits == 0
    else:
        assert times.misses == plain[1].times.misses


def test_without_bundles_a_neuron_is_two_reads(store: Store, plain: tuple[np.ndarray, Engine], tmp_path: Path) -> None:
    counts = {}
    with split_rows(store, tmp_path / "split") as folder:
        for name, split in (("bundles", None), ("apart", folder)):
            with Engine(store, EngineOptions(loaders=1, merge_gap=0, **PLAIN), split_rows=split) as engine:
                engine.prepare(1, 64)
                engine.process_prompts([(0, TEXT[:16])])
                before, logits = engine.pool.counters(), np.empty(0)
                for position in range(16, 48):
                    logits = engine.decode(TEXT[position : position + 1], np.array([position], np.int32), np.ones(1, bool))
                after = engine.pool.counters()
                counts[name] = {key: after[key] - before[key] for key in ("reads", "bytes")}
                np.testing.assert_allclose(np.asarray(logits)[0], plain[0][-1], rtol=0, atol=TOLERANCE)
    assert counts["apart"] == {"reads": 2 * counts["bundles"]["reads"], "bytes": counts["bundles"]["bytes"]}
    assert not (tmp_path / "split").exists()


def test_a_look_ahead_predictor_has_to_be_there(store: Store) -> None:
    with pytest.raises(InflashError, match="prefetch should be one of auto, none, planted-ahead; found 'planted'"):
        decode(store, prefetch="planted")
    assert decode_name(store, predictor="exact", prefetch="auto") is None  # who asks for the truth did not ask for guesses


def decode_name(store: Store, **options: Any) -> str | None:
    with Engine(store, EngineOptions(loaders=1, **{**PLAIN, **options})) as engine:
        return engine.plan.prefetch
