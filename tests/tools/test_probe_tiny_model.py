"""What `inflash probe` concludes from the steps of a tiny model."""

from dataclasses import replace

import pytest

from inflash.pipeline.cost import CostModel
from inflash.pipeline.device import Device, assumed_device
from inflash.pipeline.hit_curves import assumed_curves
from inflash.pipeline.options import EngineOptions
from inflash.storage.store import Store
from inflash.tools import probe_tiny_model, yardstick
from inflash.tools.probe_model import small_model
from inflash.tools.probe_tiny_model import LAYERS, fitted_tiny
from inflash.tools.yardstick import Yardstick, neuron_files


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_model(tmp_path_factory.mktemp("tiny") / "store", 256, LAYERS)


def device(**changes: object) -> Device:
    return replace(assumed_device(), cached_share={1: 1.0, 8: 1.0}, item_s={1: 0.0, 8: 0.0}, **changes)


def expected_ms(device: Device, store: Store, batch: int, *, streamed: bool) -> float:
    plan = probe_tiny_model._plan(store, batch, streamed=streamed)
    return CostModel(store, EngineOptions(), device, assumed_curves(store)).predict(plan, batch, 64).total_ms


def test_the_model_says_what_the_steps_took(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps; what they took comes back out of the model with the figures that were fitted to it."""
    for name, value in {"_ROWS": 256, "_DISK_S": 0.003, "_PLACINGS": 2, "_SETTLING_S": 0.0}.items():
        monkeypatch.setattr(yardstick, name, value)
    monkeypatch.setattr(probe_tiny_model, "_TURNS", 3)
    monkeypatch.setattr(probe_tiny_model, "_TURN_STEPS", 2)
    took: dict[tuple[bool, int], float] = {}
    measure = probe_tiny_model._step_s

    def remember(*arguments: object, streamed: bool) -> dict[int, float]:
        found = measure(*arguments, streamed=streamed)  # pyright: ignore[reportArgumentType]
        took.update({(streamed, batch): seconds for batch, seconds in found.items()})
        return found

    monkeypatch.setattr(probe_tiny_model, "_step_s", remember)
    # Calls that take 10 ms each: no step of so small a model takes as long, so that the share is not cut at 1.
    slow = {name: {batch: each.slower(50) for batch, each in times.items()} for name, times in assumed_device().kernels.items()}
    state = replace(assumed_device().state, cached_kernel_s={1: 1e-3, 8: 1e-3})
    found = fitted_tiny(
        device(cache_bytes=1 << 30, kernels=slow, state=state), store, Yardstick(neuron_files(store), (1, 8)), (1, 8)
    )
    for batch in (1, 8):
        assert 0 < found.cached_share[batch] < 1 and found.item_s[batch] >= 0
        assert expected_ms(found, store, batch, streamed=False) == pytest.approx(1e3 * took[False, batch], rel=1e-6)
        # What a streamed matrix takes beyond its parts is spent while the next one is read, so the model sees some of it at most.
        without = expected_ms(replace(found, item_s={1: 0.0, 8: 0.0}), store, batch, streamed=True)
        assert without <= expected_ms(found, store, batch, streamed=True) <= max(without, 1e3 * took[True, batch]) * (1 + 1e-9)


def test_where_no_cache_keeps_the_model_nothing_is_concluded(store: Store) -> None:
    known = device(cache_bytes=store.num_bytes)
    assert fitted_tiny(known, store, None, (1, 8)) is known


def test_only_models_that_caches_keep_have_faster_kernels(store: Store) -> None:
    fast = device(cache_bytes=2 * store.num_bytes)
    fast = replace(fast, cached_share={1: 0.5, 8: 0.5})
    assert fast.for_model(store.num_bytes).kernel_s("dense", 1, 1e6) == pytest.approx(0.5 * fast.kernel_s("dense", 1, 1e6))
    assert fast.for_model(store.num_bytes + 1) is fast
