"""The three sentences about what limits a run, for runs that are limited by different things."""

from typing import Any

import pytest

from inflash.tools.run_diagnosis import best_rate, limits, rate_text, size_text

CURVE = [
    {"size": size, "depth": depth, "bytes_per_s": rate}
    for size, depth, rate in ((4096, 1, 40e6), (4096, 128, 400e6), (65536, 1, 300e6), (65536, 128, 1.6e9))
]


def profile(**changes: Any) -> dict[str, Any]:
    """A run of three layers that waits for the disk."""
    usual: dict[str, Any] = {
        "token": {"steps": 40, "io_wait_ms": 90.0, "memory_ms": 4.0, "compute_ms": 20.0, "total_ms": 114.0},
        "prompts": {"s": 1.0, "tokens": 9},
        "layers": [{"hits": 100.0, "misses": 300.0}] * 3,
        "reads": {
            "depth": 1, "mean_under_way": 1.0, "busy_share": 0.93, "bytes_per_s": 41e6, "mean_bytes": 4096.0, "bytes_per_step": 4 << 20,
        },
        "device": {"read_curve": CURVE},
        "run": {"cache_hit_rate": 0.25},
        "cache": {"share": 0.05},
        "options": {"ffn": "sparse"},
        "traffic": {"dram_bytes_per_step": 2**30},
        "kernels": "native",
        "sequences": 1.0,
        "engine_queue_wait_share": 0.0,
    }  # fmt: skip
    return usual | changes


def test_a_starved_run_is_told_how_the_disk_is_asked_and_what_it_could_give() -> None:
    where, why, advice = limits(profile())
    assert "114.0 ms" in where and "90.0 ms" in where and "79 %" in where and "waited for neurons from the disk" in where
    assert "93 % of the time" in why and "1.0 at once of 1 allowed" in why and "4 KiB each" in why
    assert "got 41 MB/s" in why and "this disk gives 400 MB/s at 4 KiB with 128 under way" in why
    assert "raise --queue-depth from 1 to 128" in advice
    assert "--merge-gap" in advice and "1.60 GB/s" in advice and "at 64 KiB" in advice
    assert "25 % of those named were in a cache of 5 %" in advice and "--cache-neurons" in advice


def test_loaders_that_are_busy_with_themselves_are_named() -> None:
    between = "no read was under way: loaders were handing reads in"
    assert between not in limits(profile())[1]
    assert (
        f"for most of the 79 % that the engine waited {between}"
        in limits(profile(reads={**profile()["reads"], "busy_share": 0.3}))[1]
    )


def test_a_disk_at_its_limit_is_not_blamed_on_the_flags() -> None:
    reads = {**profile()["reads"], "depth": 128, "mean_under_way": 90.0, "bytes_per_s": 1.5e9, "mean_bytes": 65536.0}
    _, _, advice = limits(profile(reads=reads, cache={"share": 1.0}))
    assert advice.startswith("The disk gives no more for such reads")


def test_without_a_curve_nothing_is_said_of_the_disk() -> None:
    _, why, advice = limits(profile(device={"read_curve": []}))
    assert "this disk gives" not in why and "--queue-depth" in advice


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernels": "xla"}, "inflash build-kernels"),
        ({}, "--max-num-seqs"),
        ({"engine_queue_wait_share": 0.4}, "stood in line for one for 40 % of the time"),
        ({"sequences": 8.0}, "a predictor that names fewer neurons"),
    ],
)
def test_a_run_that_computes(changes: dict[str, Any], words: str) -> None:
    token = {"steps": 40, "io_wait_ms": 5.0, "memory_ms": 4.0, "compute_ms": 50.0, "total_ms": 59.0}
    where, why, advice = limits(profile(token=token, **changes))
    assert "the engine computed" in where and "1.00 GiB of weights" in why and "21.47 GB/s" in why and words in advice


def test_a_run_that_looks_neurons_up() -> None:
    token = {"steps": 40, "io_wait_ms": 5.0, "memory_ms": 30.0, "compute_ms": 20.0, "total_ms": 55.0}
    where, why, _ = limits(profile(token=token))
    assert "looked neurons up" in where and "1200 named neurons a token in 3 layers, 10000 us a layer" in why


def test_streaming_all_neurons_is_told_of_the_sparse_way() -> None:
    assert "--ffn sparse" in limits(profile(options={"ffn": "hybrid"}, cache={"share": None}))[2]


def test_a_run_without_a_token() -> None:
    sentences = limits(profile(token={"steps": 0}))
    assert len(sentences) == 3 and "No token was decoded" in sentences[0]


def test_the_nearest_size_of_the_curve_counts() -> None:
    assert best_rate(CURVE, 20000.0) == (1.6e9, CURVE[3]) and best_rate(CURVE, 10000.0) == (400e6, CURVE[1])
    assert best_rate([], 4096) is None and best_rate(CURVE, 0) is None


def test_sizes_and_rates_have_units() -> None:
    assert [size_text(2.0**power) for power in (12, 20, 31)] == ["4 KiB", "1.0 MiB", "2.00 GiB"]
    assert (rate_text(41e6), rate_text(2.5e9)) == ("41 MB/s", "2.50 GB/s")
