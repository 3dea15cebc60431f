"""`inflash bench batch`: requests run together in processes of their own, each way, and stand beside each other."""

import json
from pathlib import Path

import pytest
from synthetic_stores import synthetic_store
from tiny_models import BUFFERED

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
    sparse, dense = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert "failed" not in sparse, sparse
    assert (sparse["tokens"], sparse["steps"], sparse["together"]) == (12, 3, 3)
    assert sparse["cached_layers"] == 2 and sparse["dense_share"] == 0
    assert dense["cached_layers"] == 0 and dense["dense_share"] == 1
    assert sparse["tokens_per_s"] == pytest.approx(12 / sparse["seconds"])
    assert (tmp_path / "batches.png").exists()


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
