"""`inflash bench batch`: requests run together in processes of their own, each way, and stand beside each other."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_stores import synthetic_store
from tiny_models import BUFFERED

from inflash.tools import bench_batch
from inflash.tools.bench_batch import find_crossover
from inflash.tools.cli import main

pytestmark = pytest.mark.filterwarnings(BUFFERED)


def test_rows_show_what_was_read_and_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = synthetic_store(tmp_path / "store", num_layers=2)
    command = ["bench", "batch", str(store.path), "--memory-limit", "560MiB", "--batch", "3", "--paths", "sparse,dense"]
    command += ["--prompt-tokens", "8", "--tokens", "4", "--plot", str(tmp_path / "batches.png")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    sparse, dense = document["rows"]
    assert "failed" not in sparse, sparse
    quicker = "sparse" if sparse["decode_s"] <= dense["decode_s"] else "dense"
    assert f"crossover: the {quicker} path decodes faster for a batch of 3" in printed
    assert sorted(map(str, document["crossover"].values())) == ["3", "None"]
    assert (sparse["tokens"], sparse["steps"], sparse["together"]) == (12, 3, 3)
    assert sparse["cached_layers"] == 2 and sparse["dense_share"] == 0
    assert dense["cached_layers"] == 0 and dense["dense_share"] == 1
    assert sparse["tokens_per_s"] == pytest.approx(12 / sparse["seconds"])
    assert (tmp_path / "batches.png").exists()


def test_an_interruption_loses_no_finished_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: Path, config: dict[str, Any]) -> dict[str, Any]:
        if config["path"] == "dense":
            raise KeyboardInterrupt
        return {"failed": "no disk"}

    monkeypatch.setattr(bench_batch, "_measured", interrupted)
    store = synthetic_store(tmp_path / "store", num_layers=2)
    command = ["bench", "batch", str(store.path), "--memory-limit", "560MiB", "--batch", "3", "--paths", "sparse,dense"]
    assert main(command) == 130
    lines = capsys.readouterr().out.splitlines()
    assert "batch 3, sparse: no disk" in lines
    assert [row["failed"] for row in json.loads(lines[-1])["rows"]] == ["no disk"]


@pytest.mark.parametrize(
    ("sparse", "dense", "found", "sentence"),
    [
        ({1: 2.0, 8: 5.0, 64: 9.0}, {1: 7.0, 8: 7.0, 64: 7.0}, (8, 64), "up to a batch of 8, the dense path from 64 on"),
        ({8: 5.0, 1: 2.0}, {8: 7.0, 1: 7.0}, (8, None), "sparse path decodes faster for a batch of 8 still"),
        ({1: 9.0, 8: 9.0}, {1: 7.0, 8: 7.0}, (None, 1), "dense path decodes faster for a batch of 1 already"),
        ({1: 9.0, 8: 6.0, 64: 9.0}, {1: 7.0, 8: 7.0, 64: 7.0}, (8, 64), "up to a batch of 8"),  # 1 was a hiccup
        ({1: 9.0, 8: 9.0}, {64: 7.0, 8: 8.0}, (None, 8), "for a batch of 8 already"),
        ({1: 9.0}, {8: 7.0}, None, None),
    ],
)
def test_the_crossover_lies_above_the_largest_batch_that_reads_predicted_neurons(
    sparse: dict[int, float], dense: dict[int, float], found: tuple[int | None, int | None] | None, sentence: str | None
) -> None:
    seconds = {"sparse": sparse, "dense": dense, "auto": sparse}
    rows = [{"path": path, "batch": batch, "decode_s": s} for path, each in seconds.items() for batch, s in each.items()]
    crossover = find_crossover(rows)
    assert (crossover is None) == (found is None)
    if crossover is not None and sentence is not None:
        assert (crossover.sparse_up_to, crossover.dense_from) == found and sentence in crossover.sentence


def test_a_batch_takes_the_next_request_where_one_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = synthetic_store(tmp_path / "store", num_layers=1)
    command = [
        "bench",
        "batch",
        str(store.path),
        "--memory-limit",
        "560MiB",
        "--batch",
        "2",
        "--paths",
        "auto",
        "--requests",
        "5",
    ]
    assert main([*command, "--prompt-tokens", "8", "--tokens", "4"]) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(printed.splitlines()[-1])["rows"]
    assert "failed" not in row, row
    assert "5 requests, prompts of 8 tokens" in printed
    assert (row["tokens"], row["together"]) == (20, 2)
    assert 9 <= row["steps"] <= 15  # five requests of three decoded tokens each, two at a time
