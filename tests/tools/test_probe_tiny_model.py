"""A tiny model's steps, and what `inflash probe` concludes from them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import synthetic_store

from inflash.pipeline.device import Device, assumed_device
from inflash.tools import probe_tiny_model, tiny_model, yardstick
from inflash.tools.probe_tiny_model import expected_s, fitted_to_steps, steps_in_turn
from inflash.tools.tiny_model import TinyModel
from inflash.tools.yardstick import Yardstick, neuron_files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    with TinyModel(tmp_path_factory.mktemp("tiny") / "store", (1, 8)) as tiny:
        yield tiny


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_ROWS": 256, "_DISK_S": 0.003, "_PLACINGS": 2, "_SETTLING_S": 0.0}.items():
        monkeypatch.setattr(yardstick, name, value)
    monkeypatch.setattr(probe_tiny_model, "_TURNS", 3)
    monkeypatch.setattr(tiny_model, "_STEPS", 3)


def device(**changes: object) -> Device:
    return replace(assumed_device(), cached_share={1: 1.0, 8: 1.0}, item_s={1: 0.0, 8: 0.0}, **changes)


def test_the_model_says_what_the_steps_took(tiny: TinyModel, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps; what they took comes back out of the model with the figures that were fitted to it."""
    took: dict[tuple[bool, int], float] = {}

    def remember(tiny: TinyModel, batch: int) -> tuple[float, float]:
        took[False, batch], took[True, batch] = steps_in_turn(tiny, batch)
        return took[False, batch], took[True, batch]

    monkeypatch.setattr(probe_tiny_model, "steps_in_turn", remember)
    found = fitted_to_steps(tiny, device(cache_bytes=1 << 30))
    assert found.state.cached_step_s == {1: took[False, 1], 8: took[False, 8]}
    assert found.state.streamed_step_s == {1: took[True, 1], 8: took[True, 8]}
    for batch in (1, 8):
        assert found.cached_share[batch] > 0 and found.item_s[batch] >= 0
        assert expected_s(tiny, found, batch, streamed=False) == pytest.approx(took[False, batch], rel=1e-6)
        # What a streamed matrix takes beyond its parts is spent while the next one is read, so the model sees some of it at most.
        without = expected_s(tiny, replace(found, item_s={1: 0.0, 8: 0.0}), batch, streamed=True)
        assert (
            without * (1 - 1e-9) <= expected_s(tiny, found, batch, streamed=True) <= max(without, took[True, batch]) * (1 + 1e-9)
        )


@pytest.mark.parametrize("moods", [[1.0], [1.0, 1.5, 0.8]])
def test_what_streams_is_told_beside_the_other_in_the_same_mood(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, moods: list[float]
) -> None:
    """A machine that is slower for some turns: the ratio of the two stays."""
    mood = cycle(np.repeat(moods, 2).tolist())
    monkeypatch.setattr(tiny, "step_s", lambda batch, *, streamed=False: next(mood) * (3e-3 if streamed else 1e-3) * batch)
    for batch in (1, 8):
        whole, streamed = steps_in_turn(tiny, batch)
        assert whole == pytest.approx(batch * 1e-3) and streamed == pytest.approx(3 * whole)


def test_a_yardstick_times_the_steps_of_the_model_it_is_given(tiny: TinyModel, quick: None, tmp_path: Path) -> None:
    files = neuron_files(synthetic_store(tmp_path / "store"))
    first = Yardstick(files, (1,), tiny).measure()
    for steps in (first.cached_step_s, first.streamed_step_s):
        assert set(steps) == {1, 8} and min(steps.values()) > 0
    known = fitted_to_steps(tiny, device(cache_bytes=1 << 30))
    twice = replace(known.state, cached_step_s={batch: 2 * each for batch, each in known.state.cached_step_s.items()})
    slower = known.in_state(twice, tiny.store.num_bytes)
    for batch in (1, 8):
        assert expected_s(tiny, slower, batch, streamed=False) == pytest.approx(2 * known.state.cached_step_s[batch], rel=1e-6)


def test_where_no_cache_keeps_the_model_nothing_is_concluded(tiny: TinyModel) -> None:
    known = device(cache_bytes=tiny.store.num_bytes)
    assert fitted_to_steps(tiny, known) is known


def test_only_models_that_caches_keep_have_faster_kernels() -> None:
    num_bytes = 1 << 20
    fast = device(cache_bytes=2 * num_bytes)
    fast = replace(fast, cached_share={1: 0.5, 8: 0.5})
    assert fast.for_model(num_bytes).kernel_s("dense", 1, 1e6) == pytest.approx(0.5 * fast.kernel_s("dense", 1, 1e6))
    assert fast.for_model(num_bytes + 1) is fast
