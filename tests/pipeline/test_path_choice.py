"""Which way neurons come follows from what rows cost and how many are needed, does not flap, and is looked at again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from inflash.pipeline.path_choice import PathChoice, RowRates

D_FF, LAYERS = 1000, (0, 2, 3)


def choice(**rates: float) -> PathChoice:
    """A dense layer takes 10 ms, a missing neuron 50 us."""
    return PathChoice(LAYERS, D_FF, RowRates(**{"gathered_s": 1e-6, "missed_s": 50e-6, "streamed_s": 10e-6, **rates}))


def steps(choice: PathChoice, count: int, missed: int, *, full: bool = True) -> list[frozenset[int]]:
    """The layers that each of so many steps streams, when all layers name 900 neurons."""
    found = []
    for _ in range(count):
        found.append(choice.dense)
        for layer in LAYERS:
            choice.saw(layer, 900, missed, full=full)
        choice.next_step()
    return found


def mixed_choice() -> PathChoice:
    """After some steps in which one layer misses many neurons and the others few."""
    mixed = choice()
    for _ in range(8):
        unlike_step(mixed)
    return mixed


def unlike_step(choice: PathChoice) -> None:
    for layer, missed in zip(LAYERS, (50, 600, 50), strict=True):
        choice.saw(layer, 900, missed, full=True)
    choice.next_step()


def test_few_missing_neurons_are_read_by_themselves_and_many_in_order() -> None:
    assert steps(choice(), 8, missed=50)[-1] == frozenset()
    assert steps(choice(), 8, missed=600)[-1] == frozenset(LAYERS)
    assert mixed_choice().dense == {2}


def test_an_empty_cache_is_filled_before_anything_is_concluded() -> None:
    empty = choice()
    assert not any(steps(empty, 20, missed=900, full=False))
    assert steps(empty, 3, missed=900)[-1] == frozenset(LAYERS)


def test_nearly_equal_costs_change_nothing() -> None:
    """180 missing neurons cost what a dense layer does; some more or fewer of them flip nobody."""
    undecided = choice()
    for missed in (185, 175, 190, 170) * 6:
        (dense,) = steps(undecided, 1, missed=missed)
        assert dense == frozenset() or undecided.on_trial
    settled = choice()
    steps(settled, 8, missed=600)
    for missed in (185, 175, 190, 172) * 2:
        (dense,) = steps(settled, 1, missed=missed)
        assert dense == frozenset(LAYERS)


def test_the_other_way_is_tried_when_little_time_would_be_lost() -> None:
    once = choice()
    tried = [once.on_trial for _ in range(2000) if steps(once, 1, missed=100)]
    lost_s = sum(tried) * (D_FF * 10e-6 - (900 * 1e-6 + 100 * 50e-6))
    assert sum(tried) >= 1 and lost_s <= 0.011 * 2000 * (900 * 1e-6 + 100 * 50e-6)


def test_what_was_measured_counts_and_not_what_was_assumed() -> None:
    slower = choice()
    steps(slower, 8, missed=100)
    assert not slower.dense
    for _ in range(5):
        slower.took_sparse(900, 100, 900e-6 + 100 * 200e-6)
        steps(slower, 1, missed=100)
    assert slower.expected_s(0) == pytest.approx((900e-6 + 100 * 200e-6, 10e-3))
    assert steps(slower, 3, missed=100)[-1] == frozenset(LAYERS)
    for _ in range(5):
        slower.took_dense(0.5)
        steps(slower, 1, missed=100)
    assert slower.expected_s(0)[1] == pytest.approx(0.5)
    assert not steps(slower, 3, missed=100)[-1] or slower.on_trial


def test_one_measured_step_is_enough_where_the_assumption_was_far_off() -> None:
    """Of many sequences each names some of the neurons only: kernels may be five times as fast as rows that all of them name."""
    fast = choice(gathered_s=15e-6)
    for layer in LAYERS:
        fast.took_sparse(900, 10, 3e-3)
        fast.saw(layer, 900, 10, full=True)
    fast.next_step()
    assert fast.expected_s(0)[0] == pytest.approx(3e-3) and not fast.dense
    assert steps(choice(gathered_s=15e-6), 2, missed=10)[-1] == frozenset(LAYERS)  # without it


def test_one_step_that_was_held_up_changes_nothing() -> None:
    held_up = choice()
    for step in range(8):
        for layer in LAYERS:
            held_up.took_sparse(900, 100, 900e-6 + 100 * (50e-6 if step != 5 or layer != 3 else 0.1))
        assert steps(held_up, 1, missed=100) == [frozenset()]
    assert held_up.expected_s(0)[0] == pytest.approx(900e-6 + 100 * 50e-6)


def test_layers_that_disturb_each_other_go_one_way() -> None:
    """The layer in order looks cheap, as it is read while its neighbours wait; only their sum says what mixing costs."""
    mixed = mixed_choice()
    for _ in range(5):
        if mixed.dense == {2}:
            mixed.took_dense(2e-3)
            for _ in range(2):
                mixed.took_sparse(900, 50, 40e-3)
        unlike_step(mixed)
    assert mixed.dense == frozenset(LAYERS)  # 30 ms, where by slot takes 38
    assert mixed.expected_s(2) == pytest.approx((900e-6 + 600 * 50e-6, 10e-3))  # what steps that go one way would take, as before


@settings(max_examples=40, deadline=None)
@given(
    misses=some.lists(some.integers(0, 900), min_size=3, max_size=3),
    scale=some.floats(0.3, 3),
    streamed=some.floats(0.3, 3),
    mixing=some.floats(0.9, 2),
)
def test_a_run_is_not_much_slower_than_the_best_way(misses: list[int], scale: float, streamed: float, mixing: float) -> None:
    """On a machine that is not what was assumed, and where layers that go different ways may disturb each other."""
    run = choice()
    by_slot = {layer: scale * (900e-6 + missed * 50e-6) for layer, missed in zip(LAYERS, misses, strict=True)}
    in_order = streamed * 10e-3

    def step_s(dense: frozenset[int]) -> float:
        factor = mixing if 0 < len(dense) < len(LAYERS) else 1.0
        return factor * sum(in_order if layer in dense else by_slot[layer] for layer in LAYERS)

    total_s, num_steps = 0.0, 1000
    for _ in range(num_steps):
        factor = step_s(run.dense) / sum(in_order if layer in run.dense else by_slot[layer] for layer in LAYERS)
        for layer, missed in zip(LAYERS, misses, strict=True):
            if run.timed and layer in run.dense:
                run.took_dense(factor * in_order)
            elif run.timed:
                run.took_sparse(900, missed, factor * by_slot[layer])
            run.saw(layer, 900, missed, full=True)
        total_s += step_s(run.dense)
        run.next_step()
    best_s = min(step_s(frozenset()), step_s(frozenset(LAYERS)))
    # 7 % is what another way has to be cheaper, 1 % goes into trials, and first steps go a wrong way until they were measured.
    assert total_s <= num_steps * best_s * 1.11
