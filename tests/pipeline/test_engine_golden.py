"""Logits against transformers: five shapes of OPT, five ways to run them, prompts and decoding, one sequence and five."""

from typing import Any

import numpy as np
import pytest
from decoding import teacher_forced
from golden_logits import golden_prompts, write_golden_checkpoint
from opt_checkpoints import VARIANTS
from tiny_models import BUFFERED, convert_quietly

from inflash.pipeline.engine import Engine
from inflash.pipeline.options import EngineOptions
from inflash.storage.store import Store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

TOLERANCE = 1e-4
ALONE = ("plain", "350m", "untied")
"""Also one sequence: the others differ from these in sizes, which the kernels' tests try with one sequence, and compiling takes time."""
MODES: dict[str, dict[str, Any]] = {
    "naive": {"ffn": "naive"},
    "hybrid": {"ffn": "hybrid"},
    "resident": {"ffn": "resident"},
    "sparse-none": {"ffn": "sparse", "predictor": "none"},
    "sparse-exact": {"ffn": "sparse", "predictor": "exact"},
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def store(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp(variant)
    write_golden_checkpoint(folder / "checkpoint", variant)
    return convert_quietly(folder / "checkpoint", folder / "store", predictor_rank=0)


@pytest.mark.parametrize("mode", list(MODES))
def test_logits_equal_those_of_transformers(store: Store, variant: str, mode: str) -> None:
    texts, expected = zip(*golden_prompts(variant), strict=True)
    assert len({len(text) for text in texts}) == 5
    halves = [max(1, len(text) // 2) for text in texts]
    with Engine(store, EngineOptions(**MODES[mode], loaders=1, queue_depth=2)) as engine:
        if variant in ALONE:
            engine.prepare(1, 64)
            (alone,) = teacher_forced(engine, texts[-1:], halves[-1:])
            np.testing.assert_allclose(alone, expected[-1][halves[-1] - 1 :], rtol=0, atol=TOLERANCE)

        engine.prepare(5, 64)
        for text, logits in zip(texts, expected, strict=True):
            np.testing.assert_allclose(engine.all_logits(text), logits, rtol=0, atol=TOLERANCE)
        for found, logits, half in zip(teacher_forced(engine, texts, halves), expected, halves, strict=True):
            np.testing.assert_allclose(found, logits[half - 1 :], rtol=0, atol=TOLERANCE)
