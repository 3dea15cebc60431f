"""What `inflash probe` concludes from the steps of a tiny model."""

from collections.abc import Iterator
from dataclasses import replace

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
    measure = tiny.step_s

    def remember(*arguments: object, streamed: bool) -> dict[int, float]:
        found = measure(*arguments, streamed=streamed)
        took.update({(streamed, batch): seconds for batch, seconds in found.items()})
        return found

    monkeypatch.setattr(tiny, "step_s", remember)
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


def test_where_no_cache_keeps_the_model_nothing_is_concluded(tiny: TinyModel) -> None:
    known = device(cache_bytes=tiny.store.num_bytes)
    assert tiny.fitted(known, None) is known


def test_only_models_that_caches_keep_have_faster_kernels() -> None:
    num_bytes = 1 << 20
    fast = device(cache_bytes=2 * num_bytes)
    fast = replace(fast, cached_share={1: 0.5, 8: 0.5})
    assert fast.for_model(num_bytes).kernel_s("dense", 1, 1e6) == pytest.approx(0.5 * fast.kernel_s("dense", 1, 1e6))
    assert fast.for_model(num_bytes + 1) is fast
