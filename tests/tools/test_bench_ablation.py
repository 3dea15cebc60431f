"""`inflash bench ablation` on a tiny model: every row runs, and what each part saves is seen in what is read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic_stores import synthetic_store
from tiny_models import BUFFERED

from inflash.storage.store import Store
from inflash.tools.ablation_row import RowConfig, measure
from inflash.tools.bench_ablation import ROWS, _configs
from inflash.tools.bench_arguments import byte_count
from inflash.tools.cli import build_parser, main

pytestmark = pytest.mark.filterwarnings(BUFFERED)

LIMIT = str(600 << 20)
SHORT = ["--tokens", "10", "--warm-up", "8", "--prompt-tokens", "16", "--loaders", "1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture(scope="module")
def rows(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every row's figures, all in this process: only the last test pays for processes of their own."""
    from inflash.storage.split_rows import split_rows

    arguments = build_parser().parse_args(["bench", "ablation", str(store.path), "--memory-limit", LIMIT, *SHORT])
    figures = {}
    with split_rows(store, tmp_path_factory.mktemp("split") / "rows") as split:
        for name, config in _configs(store, arguments, list(ROWS)).items():
            config["split_rows"] = str(split) if name in ("predictor", "window") else ""
            if config["options"]["ffn"] == "sparse":
                config["options"] |= {"cache_neurons": 200, "merge_gap": 0}
            figures[name] = measure(RowConfig(**config))
    return figures


def test_every_row_is_measured(rows: dict[str, dict[str, Any]]) -> None:
    assert tuple(rows) == ROWS
    for figures in rows.values():
        assert figures["dram_bytes"] > 50 << 20
        assert figures["tokens_per_s"] == pytest.approx(1000 / figures["total_ms"])
        parts = figures["io_wait_ms"] + figures["memory_ms"] + figures["compute_ms"]
        assert parts == pytest.approx(figures["total_ms"], rel=0.5)  # medians of each need not add up


def test_each_part_reads_less(store: Store, rows: dict[str, dict[str, Any]]) -> None:
    flash = {name: figures["flash_bytes_per_token"] for name, figures in rows.items()}
    neurons = store.config.num_layers * store.bundles.layer_bytes
    # Up to 4 blocks are read for other tokens than these 10, of 3 each.
    assert flash["hybrid"] == pytest.approx(neurons, rel=0.15)
    assert flash["naive"] > flash["hybrid"] + 0.5 * store.config.num_layers * 4 * store.config.d_model**2 * 2
    assert neurons > 3 * flash["predictor"] > 3 * flash["window"] > 0
    assert flash["bundles"] == flash["window"] == flash["overlap"]
    assert rows["window"]["reads_per_token"] > 1.7 * rows["bundles"]["reads_per_token"]
    assert flash["resident"] == 0
    assert rows["lookahead"]["prefetched_per_token"] > 0 == rows["overlap"]["prefetched_per_token"]
    for name in ("predictor", "window", "bundles", "overlap", "lookahead"):
        assert flash[name] == pytest.approx(rows[name]["needed_bytes_per_token"], rel=0.1)


def test_long_runs_tell_of_drift(store: Store) -> None:
    arguments = build_parser().parse_args(
        ["bench", "ablation", str(store.path), "--memory-limit", LIMIT, *SHORT, "--tokens", "210", "--rows", "overlap"]
    )
    drift = measure(RowConfig(**_configs(store, arguments, ["overlap"])["overlap"]))["drift"]
    assert drift is not None
    assert drift["last_dram_bytes"] < drift["first_dram_bytes"] + (8 << 20)
    assert drift["first_total_ms"] > 0 < drift["last_total_ms"]


def test_the_command(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots are an optional extra")
    before = sorted(path.name for path in store.path.parent.iterdir())
    command = ["bench", "ablation", str(store.path), "--memory-limit", LIMIT, *SHORT, "--rows", "window,lookahead"]
    assert main([*command, "--plot", str(tmp_path / "rows.png")]) == 0
    assert (tmp_path / "rows.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert [row["name"] for row in document["rows"]] == ["window", "lookahead"]
    for row in document["rows"]:  # a cgroup needs root
        assert 50 << 20 < row["peak_bytes"] <= byte_count(LIMIT) if row["limited"] else row["peak_bytes"] is None
    assert "| lookahead |" in out and "+ the neurons used most stay in memory" in out
    assert sorted(path.name for path in store.path.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory-limit", "many"], "expected bytes such as 7GiB"),
        (["--memory-limit", "1MiB"], "memory: the least that would do is"),
        (["--memory-limit", LIMIT, "--rows", "naive,fast"], "expected some of naive,hybrid"),
        (["--memory-limit", LIMIT, "--tokens", "600"], "512 positions"),
        (["--memory-limit", LIMIT, "--tokens", "0"], "expected a number from 1 up, found '0'"),
        (["--memory-limit", LIMIT, "--prefetch", "planted"], "prefetch should be one of auto, none, planted-ahead"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    store: Store, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    try:
        code = main(["bench", "ablation", str(store.path), *flags])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_interrupting_leaves_nothing(store: Store) -> None:
    before = sorted(path.name for path in store.path.parent.iterdir())
    command = [sys.executable, "-m", "inflash.tools.cli", "bench", "ablation", str(store.path), "--memory-limit", LIMIT]
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from inflash.tools.cli import main; "
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}sys.exit(main({command[3:]!r} + ['--tokens', '300', '--rows', 'window']))"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not any(path.name.startswith(".store.split") for path in store.path.parent.iterdir()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=30) == 130
    assert sorted(path.name for path in store.path.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "count"),
    [("7GiB", 7 << 30), ("1.5 gib", 3 << 29), ("7000MB", 7 * 10**9), ("7e9", 7 * 10**9), ("512", 512), ("64K", 64000)],
)
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert byte_count(text) == count
