"""A traced run with the truth judges the store's predictor; its spans are those of the run."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import synthetic_store

from inflash.pipeline import trace
from inflash.pipeline.engine import Engine
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.trace_area import TraceArea
from inflash.tools.profile_figures import engine_figures, recall_figures

pytestmark = pytest.mark.filterwarnings("ignore:.*direct I/O is refused:RuntimeWarning")

STEPS = 9


@pytest.fixture
def area() -> Iterator[TraceArea]:
    made = TraceArea.make(num_writers=2, num_layers=2, d_ff=1024)
    trace.attach(made.descriptor)
    yield made
    trace.detach()
    made.close()


def test_the_predictor_is_judged_by_the_truth(area: TraceArea, tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "store", num_layers=2)
    with Engine(store, EngineOptions(predictor="exact", cache_neurons=0.2)) as engine:
        engine.prepare(1, 64)
        for position in range(STEPS):
            engine.decode(np.array([7 * position], np.int32), np.array([position], np.int32), np.ones(1, bool))
        times = engine.times
    records = area.read(0).records
    recall = recall_figures(records)
    assert recall is not None and [layer["layer"] for layer in recall["layers"]] == [0, 1]
    assert recall["steps"] == 3  # every fourth
    assert 0.8 < recall["recall"] <= 1 <= recall["named_per_active"] < 4
    figures = engine_figures(records)
    assert figures["token"]["steps"] == times.steps == STEPS
    hits, misses = (sum(layer[name] for layer in figures["layers"]) * STEPS for name in ("hits", "misses"))
    assert (hits, misses) == pytest.approx((times.hits, times.misses))
    steps, named = area.named_neurons()
    assert steps.tolist() == list(range(STEPS)) and named.sum() == times.hits + times.misses
    # Without an exact predictor there is nothing to judge by.
    assert recall_figures(records[records["kind"] != trace.RECALL]) is None
