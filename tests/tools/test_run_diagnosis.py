"""The three texts about what limits a run, for runs that are limited by different things."""

from typing import Any

import pytest
from made_up_profile import profile

from inflash.tools.run_advice import Advice, advice
from inflash.tools.run_diagnosis import advice_text, limits


def texts(**changes: Any) -> list[str]:
    made = profile(**changes)
    return limits(made, advice(made))


def test_a_starved_run_is_told_what_it_reads_and_what_the_disk_could_give() -> None:
    where, why, todo = texts()
    assert "took 114 ms" in where and "90.0 ms of it (79 %)" in where and "waited for neurons from the disk" in where
    assert (
        "holds 51 neurons of a layer; a token uses 400 there and misses 300" in why and "hardly holds more than one token" in why
    )
    assert "4.0 MiB a token in 1000 reads of 4 KiB" in why and "1.0 under way at a time (1 allowed), at 41 MB/s" in why
    assert "gives 40 MB/s with as many under way, and 400 MB/s with 128" in why
    assert todo.startswith(
        "What may help, and what it can save of a token at most: a larger cache (42.0 ms), more reads at a time (80.7 ms)"
    )


def test_loaders_that_work_more_than_they_wait_are_named() -> None:
    assert "on a processor" not in texts()[1]
    decoding = {**profile()["decoding"], "loader_cpu_ms": 80.0}
    assert "spent 84 % of the time on a processor, 80 us a read" in texts(decoding=decoding)[1]
    assert "in line" not in texts(decoding=decoding)[1]
    waiting = texts(decoding={**profile()["decoding"], "loader_queue_wait_ms": 30.0})[1]
    assert "stood in line for a processor for 31 % of the time" in waiting and "takes more of the wait" not in waiting


def test_a_disk_at_its_limit_is_not_blamed_on_the_flags() -> None:
    reads = {**profile()["reads"], "depth": 128, "mean_under_way": 90.0, "mean_bytes": 65536.0}
    model, layers = {**profile()["model"], "bundle_bytes": 65536}, [{"hits": 100.0, "misses": 20.0, "prefetched": 0.0}] * 3
    _, why, todo = texts(reads=reads, cache={"share": 1.0}, sequences=8.0, model=model, layers=layers)
    assert todo.startswith("No flag would save much: a faster disk") and "hardly" not in why


def test_without_a_curve_nothing_is_said_of_the_disk() -> None:
    assert "this disk gives" not in texts(device={"read_curve": []})[1]


def test_a_run_that_computes() -> None:
    token = {"steps": 40, "io_wait_ms": 1.0, "memory_ms": 4.0, "compute_ms": 50.0, "total_ms": 55.0}
    where, why, _ = texts(token=token)
    assert "the engine computed" in where and "1.00 GiB of weights" in why and "21.47 GB/s" in why
    assert texts(token=token, sequences=8.0)[2].startswith("No flag would save much")


def test_a_run_that_looks_neurons_up() -> None:
    token = {"steps": 40, "io_wait_ms": 5.0, "memory_ms": 30.0, "compute_ms": 20.0, "total_ms": 55.0}
    where, why, _ = texts(token=token)
    assert "looked neurons up" in where and "1200 predicted neurons a token in 3 layers, 10000 us a layer" in why


def test_several_texts_share_a_step_and_layers_in_order_name_nothing() -> None:
    layers = [{"hits": 0.0, "misses": 0.0, "prefetched": 0.0, "hit_rate": None}] * 3
    where, why, _ = texts(sequences=4.0, layers=layers, run={"dense_share": 1.0})
    assert where.startswith("A step, which makes a token for each of 4 texts, took 114 ms") and why.startswith(
        "The loaders fetched"
    )


def test_a_run_without_a_token() -> None:
    sentences = limits(profile(token={"steps": 0}), [])
    assert len(sentences) == 3 and "No token was decoded" in sentences[0]


@pytest.mark.parametrize("saves_ms", [0.5, 12.0])
def test_every_saving_is_told_beside_the_token(saves_ms: float) -> None:
    saved = "0.50 ms" if saves_ms < 1 else "12.0 ms"
    found = Advice(title="this way", text="do this", saves_ms=saves_ms)
    assert limits(profile(), [found])[2].endswith(f"at most: this way ({saved}).")
    assert advice_text(found, 114.0) == f"This way: do this. Saves at most {saved} of 114 ms."
