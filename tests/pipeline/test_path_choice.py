"""Which way neurons come follows from what rows cost and how many are needed, does not flap, and is looked at again."""

import pytest

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


def test_few_missing_neurons_are_read_by_themselves_and_many_in_order() -> None:
    assert steps(choice(), 8, missed=50)[-1] == frozenset()
    assert steps(choice(), 8, missed=600)[-1] == frozenset(LAYERS)
    mixed = choice()
    for _ in range(8):
        for layer, missed in zip(LAYERS, (50, 600, 50), strict=True):
            mixed.saw(layer, 900, missed, full=True)
        mixed.next_step()
    assert mixed.dense == {2}


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
