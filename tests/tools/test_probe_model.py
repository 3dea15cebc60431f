"""What `inflash probe` concludes from the steps of a small model."""

from dataclasses import replace

import pytest
from synthetic_stores import synthetic_store

from inflash.pipeline.cost import CostModel
from inflash.pipeline.device import Device, assumed_device
from inflash.pipeline.hit_curves import HitCurves, LayerCurve
from inflash.pipeline.machine_state import MachineState
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.plan import Plan, plan_from_options
from inflash.storage.store import Store
from inflash.tools.probe_model import _LENGTH, MeasuredSteps, best_of, with_memory_management


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(tmp_path_factory.mktemp("planted") / "store")


OPTIONS = EngineOptions(predictor="planted", prefetch="none")


def steps(store: Store, device: Device, batch: int, missed: float, slower: float = 1.0) -> MeasuredSteps:
    """As a machine with just these figures would take them, at a slower pace."""
    plan: Plan = replace(plan_from_options(store, OPTIONS), num_seqs=batch)
    flat = LayerCurve(named=200.0, guessed=0.0, slots=(1,), misses=(missed,), ahead=(0.0,), late=(missed,))
    curves = HitCurves(source="", predictor="planted", prefetch="", batches={batch: (flat,) * store.config.num_layers})
    state = device.state
    then = MachineState(
        kernel_s={size: slower * seconds for size, seconds in state.kernel_s.items()},
        cached_step_s={size: slower * seconds for size, seconds in state.cached_step_s.items()},
        streamed_step_s={size: slower * seconds for size, seconds in state.streamed_step_s.items()},
        processor_s=slower * state.processor_s,
        random_bytes_per_s=state.random_bytes_per_s / slower,
        stream_bytes_per_s=state.stream_bytes_per_s / slower,
    )
    took = CostModel(store, OPTIONS, device.in_state(then), curves).predict(plan, batch, _LENGTH // 2).total_ms / 1e3
    return MeasuredSteps(store, OPTIONS, plan, 200.0, missed, [(took, slower * 3 * (1e-4 + missed * 1e-6), then)])


def test_what_the_parts_leave_out_is_found_at_any_pace(store: Store) -> None:
    device = assumed_device()
    more = replace(device, layer_s={1: 3e-4, 8: 3e-4})
    assert steps(store, more, 1, 0.0).beyond_s(more) == pytest.approx(0, abs=1e-9)
    for slower in (1.0, 2.0):
        beyond = steps(store, more, 1, 0.0, slower).beyond_s(replace(device, layer_s={1: 0.0, 8: 0.0}))
        assert beyond == pytest.approx(3 * 3e-4, rel=0.05)


def test_the_loaders_share_and_how_late_they_begin_are_told_apart(store: Store) -> None:
    true = replace(assumed_device(), loader_share=0.6, delayed_s={1: 4e-4, 8: 1.6e-3})
    missing = {batch: [steps(store, true, batch, missed) for missed in (40.0, 160.0)] for batch in (1, 8)}
    start = replace(true, loader_share=1.0, delayed_s={1: 0.0, 8: 0.0})
    found = best_of(start, missing)
    assert found.loader_share == pytest.approx(0.6)
    assert found.delayed_s == pytest.approx({1: 4e-4, 8: 1.6e-3})
    assert found.layer_s == true.layer_s and found.read_curve == true.read_curve


def test_placing_and_asking_are_lines_through_what_steps_took(store: Store) -> None:
    device = assumed_device()
    whole = [steps(store, device, batch, 0.0, slower=2.0) for batch in (1, 8)]
    found = with_memory_management(device, whole, [steps(store, device, 1, missed) for missed in (40.0, 160.0)])
    assert found.placing.seconds(200) == pytest.approx(1e-4)
    assert [found.asking.seconds(missed) for missed in (40, 160)] == pytest.approx([4e-5, 1.6e-4])
