"""What `inflash probe` concludes from the steps of a tiny model."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from inflash.pipeline.device import Device, assumed_device
from inflash.tools import probe_tiny_model, yardstick
from inflash.tools.probe_tiny_model import TinyModel
from inflash.tools.yardstick import Yardstick, neuron_files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    with TinyModel(tmp_path_factory.mktemp("tiny") / "store", (1, 8)) as tiny:
        yield tiny


def device(**changes: object) -> Device:
    return replace(assumed_device(), cached_share={1: 1.0, 8: 1.0}, item_s={1: 0.0, 8: 0.0}, **changes)


def test_the_model_says_what_the_steps_took(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps; what they took comes back out of the model with the figures that were fitted to it."""
    for name, value in {"_ROWS": 256, "_DISK_S": 0.003, "_PLACINGS": 2, "_SETTLING_S": 0.0}.items():
        monkeypatch.setattr(yardstick, name, value)
    monkeypatch.setattr(probe_tiny_model, "_TURNS", 3)
    monkeypatch.setattr(probe_tiny_model, "_TURN_STEPS", 2)
    took: dict[tuple[bool, int], float] = {}
    measure = tiny.steps_s

    def remember(device: Device, yardstick: Yardstick, batch: int) -> tuple[float, float]:
        took[False, batch], took[True, batch] = measure(device, yardstick, batch)
        return took[False, batch], took[True, batch]

    monkeypatch.setattr(tiny, "steps_s", remember)
    # Calls that take 10 ms each: no step of so small a model takes as long, so that the share is not cut at 1.
    slow = {name: {batch: each.slower(50) for batch, each in times.items()} for name, times in assumed_device().kernels.items()}
    state = replace(assumed_device().state, cached_kernel_s={1: 1e-3, 8: 1e-3})
    found = tiny.fitted(device(cache_bytes=1 << 30, kernels=slow, state=state), Yardstick(neuron_files(tiny.store), (1, 8)))
    for batch in (1, 8):
        assert 0 < found.cached_share[batch] < 1 and found.item_s[batch] >= 0
        assert tiny.expected_s(found, batch, streamed=False) == pytest.approx(took[False, batch], rel=1e-6)
        # What a streamed matrix takes beyond its parts is spent while the next one is read, so the model sees some of it at most.
        without = tiny.expected_s(replace(found, item_s={1: 0.0, 8: 0.0}), batch, streamed=True)
        assert (
            without * (1 - 1e-9) <= tiny.expected_s(found, batch, streamed=True) <= max(without, took[True, batch]) * (1 + 1e-9)
        )


@pytest.mark.parametrize("moods", [[1.0], [1.0, 1.5, 0.8]])
def test_what_streams_is_told_beside_the_other_in_the_same_mood(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, moods: list[float]
) -> None:
    """A machine that is slower for some turns, which the looks do not see: the ratio of the two stays."""
    mood = cycle(np.repeat(moods, 2).tolist())
    monkeypatch.setattr(tiny, "_turn_s", lambda batch, *, streamed: next(mood) * (3e-3 if streamed else 1e-3) * batch)
    looks: Any = SimpleNamespace(cached_kernels=lambda times: {1: 2e-3, 8: 2e-3})
    known = device(state=replace(assumed_device().state, cached_kernel_s={1: 1e-3, 8: 1e-3}))
    for batch in (1, 8):
        whole, streamed = tiny.steps_s(known, looks, batch)
        assert whole == pytest.approx(batch * 1e-3 / 2) and streamed == pytest.approx(3 * whole)


def test_where_no_cache_keeps_the_model_nothing_is_concluded(tiny: TinyModel) -> None:
    known = device(cache_bytes=tiny.store.num_bytes)
    assert tiny.fitted(known, None) is known


def test_only_models_that_caches_keep_have_faster_kernels() -> None:
    num_bytes = 1 << 20
    fast = device(cache_bytes=2 * num_bytes)
    fast = replace(fast, cached_share={1: 0.5, 8: 0.5})
    assert fast.for_model(num_bytes).kernel_s("dense", 1, 1e6) == pytest.approx(0.5 * fast.kernel_s("dense", 1, 1e6))
    assert fast.for_model(num_bytes + 1) is fast
