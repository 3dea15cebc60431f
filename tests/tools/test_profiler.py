"""`inflash profile` as a user runs it: what is in the folder afterwards, also when a process was killed."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

import pytest
from synthetic_stores import synthetic_store

from inflash.pipeline.trace_area import TraceArea
from inflash.storage.store import Store
from inflash.tools import cli, profiler
from inflash.tools.profile_arguments import engine_words, sampling_words

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*direct I/O is refused:RuntimeWarning")]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CURVE = {
    "read_curve": [{"size": size, "depth": depth, "bytes_per_s": 1e5 * size} for size in (4096, 65536) for depth in (1, 128)]
}
WAIT_S = 120


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(tmp_path_factory.mktemp("model") / "store", num_layers=2, max_positions=1024)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("device") / "device.json"
    file.write_text(json.dumps(CURVE))
    return file


def words(store: Store, device: Path, output: Path, prompt_ids: str, **body: Any) -> list[str]:
    """A profile of a batch of one request; the store has no tokenizer."""
    request = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": json.loads(prompt_ids), "temperature": 0, **body},
    }
    (output.parent / "in.jsonl").write_text(json.dumps(request) + "\n")
    files = ["-i", str(output.parent / "in.jsonl"), "-o", str(output), "--device", str(device)]
    return ["profile", str(store.path), *files, "--cache-neurons", "0.1"]


@pytest.fixture(scope="module")
def finished(store: Store, device: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "profile"
    command = words(store, device, output, "[5, 6, 7]", max_tokens=40, ignore_eos=True)
    assert cli.main([*command, "--loaders", "2", "--queue-depth", "4", "--jax-trace"]) == 0
    return output


def test_a_finished_run_leaves_a_trace_figures_and_a_report(finished: Path, store: Store) -> None:
    profile = json.loads((finished / "profile.json").read_text())
    assert profile["ended"] == {"exit_code": 0, "what": "completed"} and len(profile["limits"]) == 3
    run, token = profile["run"], profile["token"]
    assert token["steps"] == run["steps"] == 39 and profile["options"]["queue_depth"] == 4
    # Spans and the engine's own counters are taken a few microseconds apart.
    for name in ("total_ms", "io_wait_ms", "memory_ms", "compute_ms"):
        assert token[name] == pytest.approx(run[name], rel=0.1, abs=0.1)
    assert sum(layer["hits"] for layer in profile["layers"]) / sum(
        layer["hits"] + layer["misses"] for layer in profile["layers"]
    ) == (pytest.approx(run["cache_hit_rate"]))
    assert profile["reads"]["bytes_per_step"] == pytest.approx(run["mib_per_token"] * 2**20, rel=0.05)
    picked = sum(size["picked"] for size in profile["reads"]["sizes"])
    assert picked == pytest.approx(39 * profile["reads"]["per_step"]) and 0 < profile["reads"]["mean_under_way"] <= 8
    assert list(profile["processes"]) == ["engine", "loader 0", "loader 1"]
    assert 0 < profile["reads"]["wait_reading_ms"] <= profile["reads"]["wait_asked_ms"] <= token["io_wait_ms"] * 1.01
    assert profile["start_s"] > 0.1 and profile["decoding"]["s"] < run["decode_s"] * 1.5
    assert profile["energy"]["joules_per_token"] > 0 and profile["device"]["read_curve"] == CURVE["read_curve"]
    assert {point["tokens"] for point in profile["working_set"]} == {1, 2, 4, 8, 16, 32}
    assert json.loads((finished / "responses.jsonl").read_text())["response"]["status_code"] == 200
    assert list((finished / "jax-trace").rglob("*.xplane.pb"))


def test_the_trace_shows_every_token_and_layer_and_where_neurons_came_from(finished: Path, store: Store) -> None:
    events = json.loads((finished / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    named = [event["name"] for event in spans]
    assert [name for name in named if name.startswith("token ")] == [f"token {step}" for step in range(39)]
    assert named.count("layer 0") == named.count("layer 1") == 39
    assert {
        "start",
        "compile",
        "prompt",
        "block",
        "attention",
        "predict",
        "look up",
        "wait",
        "head",
        "sampling",
        "submit",
        "read",
    } <= set(named)
    assert not [event for event in spans if event["args"].get("unfinished")]
    arrows = {phase: {event["id"] for event in events if event["ph"] == phase} for phase in "stf"}
    assert arrows["s"] == arrows["t"] and len(arrows["f"]) > 39
    assert len({event["pid"] for event in spans}) == 3


def test_the_report_needs_nothing_else_and_says_what_limits_the_run(finished: Path) -> None:
    report, profile = (finished / "report.html").read_text(), json.loads((finished / "profile.json").read_text())
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script", report)
    assert report.count("<svg") > 12 and "$" not in re.sub(r"<code>.*?</code>", "", report)
    for title in (
        "Where a token",
        "Time by layer",
        "Rate of the reads",
        "How large the cache should be",
        "Recall of the predictor",
        "Energy",
    ):
        assert title in report
    told = [*profile["limits"][:2], *(one["text"] for one in profile["advice"])]
    assert profile["advice"] and all(escape(text) in report for text in told)


def test_a_colour_means_one_thing_and_is_defined_for_every_medium(finished: Path) -> None:
    report = (finished / "report.html").read_text()
    styles = set(re.findall(r'class="(?:bar|line|mark|dot) (\w+)', report))
    assert {"wait", "manage", "compute", "neurons", "engine", "loader", "run"} <= styles
    for name in styles:
        assert len(re.findall(rf"--{name}: #", report)) == 3 and f"var(--{name})" in report, name  # light, dark, printed


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_report_without_complaint(finished: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    quiet = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr",
    ]  # fmt: skip
    command = [
        CHROMIUM,
        *quiet,
        f"--user-data-dir={tmp_path / 'data'}",
        f"--screenshot={tmp_path / 'report.png'}",
        "--window-size=900,2000",
    ]
    drawn = subprocess.run([*command, (finished / "report.html").as_uri()], capture_output=True, text=True, timeout=WAIT_S)
    assert drawn.returncode == 0 and "CONSOLE" not in drawn.stderr
    assert (tmp_path / "report.png").stat().st_size > 20_000


@pytest.mark.parametrize("victim", ["loader", "engine"])
def test_a_killed_process_leaves_its_last_span(store: Store, device: Path, tmp_path: Path, victim: str) -> None:
    command = words(store, device, tmp_path / "profile", "[5, 6]", max_tokens=1000, ignore_eos=True)
    profiling = subprocess.Popen(
        [sys.executable, "-m", "inflash.tools.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    engine, loader = wait_for_steps(profiling)
    if victim == "engine":
        stop_within_a_span(engine)
    os.kill(loader if victim == "loader" else engine, signal.SIGKILL)
    _, errors = profiling.communicate(timeout=WAIT_S)
    assert profiling.returncode == 1, errors
    profile = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert profile["ended"]["exit_code"] == 1 and profile["token"]["steps"] > 0
    assert "This run did not complete" in (tmp_path / "profile" / "report.html").read_text()
    spans = [
        event for event in json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"
    ]
    # Its spans reach as far as the other process's: what was under way, or the last thing that it had done.
    last = {pid: max(event["ts"] + event["dur"] for event in spans if event["pid"] == pid) for pid in (engine, loader)}
    assert last[loader] == pytest.approx(last[engine], abs=1e6)
    if victim == "engine":
        assert "signal 9" in profile["ended"]["what"]
        assert [event for event in spans if event["pid"] == engine and event["args"].get("unfinished")]


def test_a_run_whose_watcher_was_killed_begins_nothing_more(store: Store, device: Path, tmp_path: Path) -> None:
    command = words(store, device, tmp_path / "profile", "[5, 6]", max_tokens=1000, ignore_eos=True)
    request = (tmp_path / "in.jsonl").read_text()
    (tmp_path / "in.jsonl").write_text("".join(request.replace('"custom_id": "a"', f'"custom_id": "{n}"') for n in range(8)))
    profiling = subprocess.Popen(
        [sys.executable, "-m", "inflash.tools.cli", *command, "--max-num-seqs", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes = wait_for_steps(profiling)
    profiling.kill()
    profiling.communicate(timeout=WAIT_S)  # until the run, which has the pipes' other ends, is over
    deadline = time.monotonic() + WAIT_S
    while any(
        Path(f"/proc/{process}/cmdline").exists() and Path(f"/proc/{process}/cmdline").read_bytes() for process in processes
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len((tmp_path / "profile" / "responses.jsonl").read_text().splitlines()) == 1  # what was in flight


def stop_within_a_span(engine: int) -> None:
    """Stops the engine at a moment at which a span of its is under way: between two steps there is none."""
    descriptors = Path(f"/proc/{engine}/fd").iterdir()
    mapped = next(path for path in descriptors if os.readlink(path).startswith("/memfd:inflash-trace"))
    area, deadline = TraceArea(os.open(mapped, os.O_RDWR)), time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        os.kill(engine, signal.SIGSTOP)
        stopped = "\nState:\tT" in Path(f"/proc/{engine}/status").read_text()
        if stopped and (area.read(0).records["end_ns"] == 0).any():
            return area.close()
        os.kill(engine, signal.SIGCONT)
        time.sleep(0.003)
    raise AssertionError("no span was ever under way")


def wait_for_steps(profiling: subprocess.Popen) -> tuple[int, int]:
    """Process ids of the engine and its loader once tokens are being decoded."""
    from inflash.errors import InflashError
    from inflash.pipeline.live import LiveReader

    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and profiling.poll() is None:
        children = Path(f"/proc/{profiling.pid}/task/{profiling.pid}/children").read_text().split()
        try:
            reader = LiveReader(int(children[0]))
            if reader.read().times.steps > 3:
                return reader.pid, reader.about["loaders"][0][0]
        except (IndexError, InflashError):
            pass
        time.sleep(0.01)
    raise AssertionError(profiling.communicate()[1])


def test_bad_input_is_told_before_anything_is_made(store: Store, device: Path, tmp_path: Path, capsys) -> None:
    command = words(store, device, tmp_path / "profile", "[5]", max_tokens=1)
    assert cli.main([*command, "--temperature", "0"]) == 2
    assert "--temperature: with -i each request of the batch says how it is sampled" in capsys.readouterr().err
    device_file = tmp_path / "curve.json"
    device_file.write_text('{"read_curve": [{"size": 1}]}')
    assert cli.main([*command, "--device", str(device_file)]) == 2
    assert "read_curve" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_a_run_that_never_came_to_a_model_has_its_own_exit_code(store: Store, device: Path, tmp_path: Path, capfd) -> None:
    output = tmp_path / "profile"
    command = words(store, device, output, "[5]", max_tokens=1)
    (tmp_path / "in.jsonl").write_text("nonsense\n")
    assert cli.main(command) == 2
    assert [path.name for path in output.iterdir()] == ["responses.jsonl.job.json"]  # which says what is wrong
    assert "inflash: error: " in capfd.readouterr().err


def parse(*given: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(["profile", "model", "--prompt=a", "-o", "out", *given])


def test_the_profiled_command_line_is_the_one_that_was_asked_for() -> None:
    given = [
        "--cache-neurons", "0.5", "--window", "4", "--policy", "window", "--no-overlap", "--verify", "--seed", "7", "--stop", "a b",
        "--stop=-c", "--stop-token-ids", "3,4", "--temperature", "0", "--ignore-eos",
    ]  # fmt: skip
    wanted = parse(*given)
    made = profiler.run_words(wanted)
    again = cli.build_parser().parse_args(made)
    for name in (
        "cache_neurons",
        "window",
        "policy",
        "overlap",
        "verify",
        "seed",
        "stop",
        "stop_token_ids",
        "temperature",
        "ignore_eos",
    ):
        assert getattr(again, name) == getattr(wanted, name), name
    assert again.prompt == ["a"] and str(again.model) == "model"
    assert engine_words(parse()) == [] == sampling_words(parse())
