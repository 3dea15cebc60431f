"""Plans without running them: they keep to the budget, more memory is never slower, and the least is the least."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflash.errors import InflashError
from inflash.pipeline import planner as planner_module
from inflash.pipeline.cost import CostModel
from inflash.pipeline.device import Device, ReadPoint, assumed_device
from inflash.pipeline.hit_curves import HitCurves, assumed_curves, count_misses
from inflash.pipeline.machine_state import MachineState
from inflash.pipeline.memory_parts import total_bytes
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.plan import CACHED, RESIDENT, STREAMED, plan_from_options
from inflash.pipeline.planner import Planner
from inflash.storage.model_config import ModelConfig
from inflash.storage.predictor_layout import PredictorInfo
from inflash.storage.store import Store

LAYERS, D_FF = 4, 4096


@cache
def store() -> Store:
    """Half a gigabyte that exists on paper only."""
    config = ModelConfig(
        family="opt", vocab_size=5000, d_model=1024, d_ff=D_FF, num_layers=LAYERS, num_heads=8, max_positions=2048, embed_dim=1024
    )
    info = PredictorInfo(kind="low_rank", method="svd", ranks=(64,) * LAYERS, dtype="bfloat16")
    predictors = {"svd": info, "svd-ahead": replace(info, ahead=1)}
    return Store(path=Path("nowhere"), config=config, dtype="bfloat16", source="", predictors=predictors)


@cache
def curves() -> HitCurves:
    """Layers that differ: some name many neurons, some few."""
    rng, layers = np.random.default_rng(3), []
    for layer in range(LAYERS):
        often = rng.permutation(np.exp(1.5 * rng.standard_normal(D_FF)))
        often = np.minimum(often * (0.02 + 0.05 * layer) / often.mean(), 1)
        named = rng.random((96, D_FF)) < often
        guessed = named & (rng.random(named.shape) < 0.95) | (rng.random(named.shape) < 0.002)
        layers.append((np.packbits(named, axis=1), np.packbits(guessed, axis=1)))
    batches = {b: tuple(count_misses(named, guessed, D_FF, b) for named, guessed in layers) for b in (1, 8)}
    return HitCurves(source="made up", predictor="svd", prefetch="svd-ahead", batches=batches)


def planner(**options: Any) -> Planner:
    return Planner(store(), EngineOptions(**options), assumed_device(), curves())


@settings(max_examples=8)
@given(share=st.floats(0, 1.2), more=st.floats(0, 0.5), batch=st.sampled_from([1, 3, 8]), length=st.integers(1, 600))
def test_within_the_budget_and_never_slower_with_more(share: float, more: float, batch: int, length: int) -> None:
    plans = planner()
    least = plans.least_bytes(batch, length)
    room = plans.most_bytes(batch, length) - least
    found = [plans.plan(least + int(room * part), batch, length) for part in (share, share + more)]
    for one in found:
        assert total_bytes(store(), plans.options, one.plan) == one.used_bytes <= one.memory_bytes
        assert one.least_bytes == least
        parts = one.predicted
        assert parts.io_wait_ms + parts.memory_ms + parts.compute_ms == pytest.approx(parts.total_ms)
    assert found[1].predicted.total_ms <= found[0].predicted.total_ms * 1.001


@settings(max_examples=5)
@given(batch=st.integers(1, 8), length=st.integers(1, 600))
def test_the_least_is_accepted_and_one_byte_less_refused(batch: int, length: int) -> None:
    plans = planner()
    least = plans.least_bytes(batch, length)
    assert plans.plan(least, batch, length).used_bytes == least
    with pytest.raises(InflashError, match=rf"{batch} x {length} tokens need at least {-(-least // 2**20)} MiB"):
        plans.plan(least - 1, batch, length)


def test_what_is_given_is_kept() -> None:
    memory = planner().most_bytes(1, 64)
    plan = planner(cache_neurons=0.5, merge_gap=12288, queue_depth=7, prefetch="none").plan(memory, 1, 64).plan
    assert plan.ffn == (CACHED,) * LAYERS and plan.slots == (D_FF // 2,) * LAYERS
    assert (plan.merge_gap, plan.queue_depth, plan.prefetch) == (12288, 7, None)
    assert planner(ffn="hybrid").plan(memory, 1, 64).plan.ffn == (STREAMED,) * LAYERS


def test_more_slots_where_more_is_missed() -> None:
    plans = planner()
    memory = plans.least_bytes(1, 64) + (24 << 20)
    found = plans.plan(memory, 1, 64).plan
    assert found.ffn == (CACHED,) * LAYERS and found.slots[3] > 1.5 * found.slots[0]
    again = plans.divide_again(found, {layer: 900.0 if layer == 0 else 1.0 for layer in range(LAYERS)})
    assert again[0] > found.slots[0] and sum(again) <= sum(found.slots)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_numbers_of_streamed_layers_between_those_tried_first(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = planner()
    memory = plans.least_bytes(1, 64) + int(share * (plans.most_bytes(1, 64) - plans.least_bytes(1, 64)))
    every = plans.plan(memory, 1, 64)
    monkeypatch.setattr(planner_module, "_ATTENTION_STEPS", 2)  # none, the output projections and both of 4 layers at first
    assert planner().plan(memory, 1, 64).predicted.total_ms == every.predicted.total_ms
    monkeypatch.setattr(Planner, "_around", lambda *_: iter(()))
    without = planner().plan(memory, 1, 64)
    streamed = sum(without.plan.streamed_qkv) + sum(without.plan.streamed_out)
    assert streamed in (0, 4, 8) and without.predicted.total_ms >= every.predicted.total_ms


def test_fewer_sequences_than_asked_for() -> None:
    plans = planner()
    assert plans.fitting_seqs(plans.least_bytes(2, 512), 8, 512) == 2
    assert plans.fitting_seqs(1, 8, 512) == 1


def cost(device: Device, **options: Any):
    given = EngineOptions(max_num_seqs=1, max_model_len=64, **options)
    return CostModel(store(), given, device, curves()).predict(plan_from_options(store(), given), 1, 32)


def test_what_is_streamed_takes_the_disk_s_time_or_the_kernels() -> None:
    device = assumed_device()
    slow, fast = (
        cost(replace(device, state=replace(device.state, stream_bytes_per_s=rate), stream_bytes_per_s=rate), ffn="naive")
        for rate in (1e7, 1e12)
    )
    assert slow.total_ms == pytest.approx(slow.read_bytes / 1e7 * 1e3, rel=0.05)
    assert slow.read_bytes == pytest.approx(store().num_bytes - 2048 * 1024 * 2, rel=0.01)  # all but positions and vectors
    assert fast.io_wait_ms < 0.05 * fast.total_ms


def test_guesses_hide_reading_behind_computing() -> None:
    device = assumed_device()
    with_guesses, without = (cost(device, prefetch=name, cache_neurons=0.25) for name in ("auto", "none"))
    assert with_guesses.io_wait_ms < 0.7 * without.io_wait_ms
    assert with_guesses.reads > without.reads > 0


def test_few_reads_are_bound_by_latency_many_by_rate() -> None:
    device = replace(assumed_device(), request_s=0.0, loader_share=1.0)
    assert device.read_s(1, 4096, 128) == pytest.approx(4096 / 40e6)
    assert device.read_s(10_000, 4096, 128) == pytest.approx(10_000 * 4096 / 250e6)
    assert device.read_s(0, 4096, 128) == 0
    # A loader's processor time comes in hundredths of a second: a few reads may have taken none.
    assert replace(device, read_cpu_s=0.0).read_s(10_000, 4096, 128) == pytest.approx(10_000 * 4096 / 250e6)
    assert device.best_depth(4096) == 128


def test_a_disk_that_was_held_down_while_it_was_probed_is_still_asked_for_many_reads_at_once() -> None:
    flat = tuple(ReadPoint(size=size, depth=depth, bytes_per_s=3e7) for size in (4096, 65536) for depth in (1, 16, 128))
    assert replace(assumed_device(), read_curve=flat).best_depth(4096) == 16


@pytest.mark.parametrize(("deep", "deepest", "held_down"), [(89e6, 128, True), (91e6, 128, False), (30e6, 32, False)])
def test_a_curve_that_does_not_rise_with_reads_under_way_is_told(deep: float, deepest: int, held_down: bool) -> None:
    """Of the smallest reads, and where there were enough of them."""
    points = [(4096, 1, 30e6), (4096, 16, 2e8), (4096, deepest, deep), (65536, 1, 1e8), (65536, deepest, 1e8)]
    curve = tuple(ReadPoint(size=size, depth=depth, bytes_per_s=rate) for size, depth, rate in points)
    told = replace(assumed_device(), read_curve=curve).held_down()
    assert told.startswith("128 reads of 4 KiB under way got 89 MB/s where one got 30: ") == bool(told) == held_down


def test_figures_survive_a_file() -> None:
    device = assumed_device()
    assert Device.from_json(json.loads(json.dumps(device.to_json()))) == device
    assert HitCurves.from_json(json.loads(json.dumps(curves().to_json()))) == curves()


def test_misses_are_counted_as_the_cache_has_them() -> None:
    """Half of the neurons at every token, in turns: all hits where both halves fit, nothing but misses where one does."""
    halves = np.zeros((30, 64), bool)
    halves[::2, :32], halves[1::2, 32:] = True, True
    curve = count_misses(np.packbits(halves, axis=1), None, 64, 1)
    assert (curve.named, curve.slots[0]) == (32, 32)
    assert curve.at("misses", 64) == 0 and curve.misses[0] == pytest.approx(32, abs=16)
    both = count_misses(np.packbits(halves, axis=1), np.packbits(halves, axis=1), 64, 2)
    assert both.named == 64 and both.slots == (64,)


def test_a_model_of_which_nothing_is_known_has_curves_for_every_batch() -> None:
    found = assumed_curves(store())
    assert "assumed" in found.source and found.of(3) is found.batches[4] and found.of(1000) is found.batches[32]
    curve = found.of(1)[0]
    assert curve.named == pytest.approx(0.047 * D_FF, rel=0.15)
    assert list(curve.misses) == sorted(curve.misses, reverse=True) and curve.misses[-1] == 0


def test_a_machine_that_others_use_is_as_much_slower_as_what_it_is_slow_at() -> None:
    device = assumed_device()
    state = device.state
    slow = MachineState(
        kernel_s={batch: 2 * each for batch, each in state.kernel_s.items()},
        cached_step_s={batch: 6 * each for batch, each in state.cached_step_s.items()},
        streamed_step_s={batch: 7 * each for batch, each in state.streamed_step_s.items()},
        processor_s=3 * state.processor_s,
        random_bytes_per_s=state.random_bytes_per_s / 4,
        stream_bytes_per_s=state.stream_bytes_per_s / 5,
    )
    now = device.in_state(slow)
    assert now.kernel_s("attention", 8, 1e8) == pytest.approx(2 * device.kernel_s("attention", 8, 1e8))
    assert now.placing.seconds(100) == pytest.approx(3 * device.placing.seconds(100))
    assert now.asking.seconds(100) == pytest.approx(3 * device.asking.seconds(100))
    assert now.rate_at(8192, 16) == pytest.approx(device.rate_at(8192, 16) / 4)
    assert now.stream_bytes_per_s == pytest.approx(device.stream_bytes_per_s / 5)
    small = replace(device, cache_bytes=32 << 20).in_state(slow, 16 << 20)
    assert small.kernel_s("attention", 8, 1e6) == pytest.approx(6 * device.kernel_s("attention", 8, 1e6))
    assert small.item_s == {batch: pytest.approx(7 * each) for batch, each in device.item_s.items()}
    assert small.stream_bytes_per_s == pytest.approx(device.stream_bytes_per_s / 7)
    assert replace(device, cache_bytes=32 << 20).in_state(slow, 17 << 20).kernels == now.kernels
    assert now.in_state(state).placing.seconds(100) == pytest.approx(device.placing.seconds(100))
    assert MachineState.between([state, slow, slow]) == slow


def test_matrices_come_more_slowly_where_kernels_keep_loaders_from_the_processors() -> None:
    given = EngineOptions(ffn="resident", max_num_seqs=1, max_model_len=64)
    streamed = (True,) * LAYERS
    plan = replace(plan_from_options(store(), given), streamed_qkv=streamed, streamed_out=streamed)
    device = replace(assumed_device(), stream_cpu_s=0.0)
    alone = device.state.stream_bytes_per_s

    def step_ms(beside: float, slower: float) -> float:
        kernels = {name: {b: each.slower(slower) for b, each in times.items()} for name, times in device.kernels.items()}
        known = replace(device, stream_bytes_per_s=beside, kernels=kernels)
        return CostModel(store(), given, known, curves()).predict(plan, 1, 32).total_ms

    assert step_ms(alone / 4, 1e-3) == pytest.approx(step_ms(alone, 1e-3), rel=0.1), "next to nothing is computed meanwhile"
    assert step_ms(alone / 4, 4) > 1.3 * step_ms(alone, 4)
    assert step_ms(2 * alone, 4) == step_ms(alone, 4), "kernels make no disk faster"


def test_a_loader_is_no_faster_than_its_processor_time_allows() -> None:
    device = replace(assumed_device(), request_s=0.0, loader_share=1.0, read_cpu_s=1e-3)
    assert device.read_s(1000, 4096, 128) == pytest.approx(1.0)
    assert device.read_s(1000, 4096, 256, loaders=2) == pytest.approx(0.5)


def test_many_sequences_cost_what_they_name() -> None:
    """Beyond a group, native kernels take each group through its own neurons only; other kernels take all through all."""
    device = replace(assumed_device(), machine={"kernels": "native"})
    assert device.gather_s(8, 1e6, 0.1) == device.kernel_s("gather", 8, 1e6)
    assert device.gather_s(64, 1e6, 0.25) == device.kernel_s("gather", 8, 2e6)
    assert assumed_device().gather_s(64, 1e6, 0.25) == 8 * device.kernel_s("gather", 8, 1e6)


def test_a_step_holds_what_lies_between_kernels_and_what_requests_wait_for() -> None:
    device = replace(assumed_device(), layer_s={1: 0.0, 8: 0.0}, delayed_s={1: 0.0, 8: 0.0})
    plain = cost(device, prefetch="none", cache_neurons=0.25)
    between = cost(replace(device, layer_s={1: 1e-3, 8: 5e-3}), prefetch="none", cache_neurons=0.25)
    late = cost(replace(device, delayed_s={1: 2e-3, 8: 5e-3}), prefetch="none", cache_neurons=0.25)
    layers = store().config.num_layers
    assert between.total_ms == pytest.approx(plain.total_ms + layers, rel=0.01)
    assert plain.total_ms < late.total_ms <= plain.total_ms + 2 * layers * 1.01  # reading goes on meanwhile
    resident = cost(replace(device, layer_s={1: 1e-3, 8: 5e-3}, delayed_s={1: 2e-3, 8: 5e-3}), ffn="resident")
    assert resident.total_ms == cost(device, ffn="resident").total_ms
    assert device.between_s(4) == 0 and replace(device, layer_s={1: 1.0, 8: 8.0}).between_s(4) == pytest.approx(4.0)


def test_keys_and_values_are_counted_once_for_each_sequence() -> None:
    """Looking further back costs 64 sequences eight times as much as eight."""
    model = CostModel(store(), EngineOptions(), assumed_device(), curves())
    plan = plan_from_options(store(), EngineOptions(ffn="hybrid", max_num_seqs=1, max_model_len=64))
    plan = replace(plan, ffn=(RESIDENT,) * LAYERS, slots=(D_FF,) * LAYERS)
    near, far = (model.predict(plan, 64, positions).compute_ms for positions in (500, 1000))
    few_near, few_far = (model.predict(plan, 8, positions).compute_ms for positions in (500, 1000))
    assert far - near == pytest.approx(8 * (few_far - few_near), rel=1e-6)
