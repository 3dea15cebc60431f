"""Advice: what each change can save at most, in which order, and when it is not given."""

from typing import Any

import pytest
from made_up_profile import profile

from inflash.tools.run_advice import Advice, advice, loader_busy, windows


def one(title: str, **changes: Any) -> Advice:
    (found,) = (each for each in advice(profile(**changes)) if each.title == title)
    return found


def titles(**changes: Any) -> list[str]:
    return [each.title for each in advice(profile(**changes))]


def test_a_tight_cache_comes_first_and_the_others_by_what_they_save() -> None:
    found = advice(profile())
    assert found[0].title == "a larger cache"
    assert [each.saves_ms for each in found[1:]] == sorted((each.saves_ms for each in found[1:]), reverse=True)
    computes = {"steps": 40, "io_wait_ms": 40.0, "memory_ms": 4.0, "compute_ms": 60.0, "total_ms": 104.0}
    assert not advice(profile(token=computes))[0].first
    roomy = profile(cache={"share": 0.79})["cache"]
    assert titles(cache=roomy)[0] == "more reads at a time"


def test_the_cache_s_target_is_the_smallest_window_that_saves_half_of_the_most() -> None:
    """Three quarters are missed now; a window of 8 would miss 0.1, one of 2 already 0.4, and 0.75 - 0.4 > (0.75 - 0.1) / 2."""
    found = one("a larger cache")
    assert "--cache-neurons 0.5 gives it 512 of 1024 neurons a layer (2.0 MiB a layer, 5.4 MiB more in all)" in found.text
    assert "as many as 2 tokens use together" in found.text and "miss about 40 %" in found.text and "now 75 %" in found.text
    assert found.saves_ms == pytest.approx(90 * (1 - 0.4 / 0.75))
    assert "a larger --memory gives" in one("a larger cache", options={**profile()["options"], "memory": 2**30}).text
    for changes in ({"cache": {"share": 1.0}}, {"cache": {"share": None}}, {"working_set": []}, {"run": {"dense_share": 0.9}}):
        assert "a larger cache" not in titles(**changes)


def test_windows_are_means_over_layers_that_a_token_came_after() -> None:
    points = [
        {"layer": layer, "tokens": tokens, "share": 0.1 * tokens * (1 + layer), "missed": missed}
        for layer in (0, 1)
        for tokens, missed in ((1, 0.5), (2, None))
    ]
    assert windows(profile(working_set=points)) == [{"tokens": 1, "share": pytest.approx(0.15), "missed": 0.5}]


def test_deeper_reads_save_what_the_curve_gives_and_what_handling_them_together_saves() -> None:
    found = one("more reads at a time")
    assert "--queue-depth 128 instead of 1" in found.text and "10.0 times as fast" in found.text
    assert found.saves_ms == pytest.approx(70 * 0.9 + 18 * (1 - 1 / 64))
    few = {**profile()["reads"], "per_step": 24.0}  # eight of a layer: no more of them can be under way
    assert "With 8 under way" in one("more reads at a time", reads=few).text
    many = {**profile()["reads"], "depth": 128}  # that many are allowed already, and there never are
    assert "more reads at a time" not in titles(reads=many)
    assert "more reads at a time" not in titles(device={"read_curve": []})


def test_a_wider_gap_is_told_only_where_reading_in_vain_pays() -> None:
    few = [{"hits": 100.0, "misses": 27.0, "prefetched": 0.0}] * 3  # one of 38
    assert "fewer, larger reads" not in titles(layers=few, cache={"share": 0.79})
    flat = [{"size": size, "depth": depth, "bytes_per_s": 1e4 * size} for size in (4096, 65536) for depth in (1, 128)]
    found = one(
        "fewer, larger reads", layers=[{"hits": 10.0, "misses": 512.0, "prefetched": 0.0}] * 3, device={"read_curve": flat}
    )
    assert found.saves_ms > 40 and "--merge-gap" in found.text  # a read takes as long, however large it is


def test_one_more_loader_where_the_first_is_busy_and_a_processor_free() -> None:
    busy = {**profile()["decoding"], "loader_cpu_ms": 80.0}
    assert loader_busy(profile(decoding=busy)) == pytest.approx(80 / (0.84 * 114))
    four = {"processors": 4}
    assert one("one more loader", decoding=busy, machine=four).saves_ms == pytest.approx(45)
    assert "one more loader" not in titles(machine=four) and "one more loader" not in titles(decoding=busy)
    assert loader_busy(profile(decoding={**busy, "loader_cpu_ms": None})) == 0


@pytest.mark.parametrize(
    ("changes", "title", "saves_ms"),
    [
        ({"kernels": "xla"}, "native kernels", 50.0),
        ({}, "several texts at once", 54 * 7 / 8),
        (
            {"engine_queue_wait_share": 0.4, "decoding": {"loader_cpu_ms": None, "engine_queue_wait_ms": 30.0}},
            "more free processors",
            30.0,
        ),
        ({"options": {**profile()["options"], "prefetch": "none"}, "look_ahead": ["trained-ahead"]}, "reading ahead", 15.0),
        ({"options": {**profile()["options"], "ffn": "hybrid"}, "cache": {"share": None}}, "only predicted neurons", 15.0),
    ],
)
def test_a_run_that_computes(changes: dict[str, Any], title: str, saves_ms: float) -> None:
    token = {"steps": 40, "io_wait_ms": 15.0, "memory_ms": 4.0, "compute_ms": 50.0, "total_ms": 69.0}
    assert one(title, token=token, **changes).saves_ms == pytest.approx(saves_ms)


def test_what_saves_next_to_nothing_is_not_told() -> None:
    token = {"steps": 40, "io_wait_ms": 2.0, "memory_ms": 1.0, "compute_ms": 97.0, "total_ms": 100.0}
    assert titles(token=token, sequences=8.0, cache={"share": 0.79}) == []
