"""`inflash run-batch` as a user runs it: what is in the files afterwards, whatever happened meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opt_checkpoints import write_opt_checkpoint
from safetensors.numpy import load_file, save_file
from tiny_models import BUFFERED, convert_quietly, make_store

from inflash.storage.store import Store
from inflash.tools import cli

pytestmark = [pytest.mark.filterwarnings(BUFFERED), pytest.mark.integration]

WAIT_S = 60
HEARING = """
import signal, sys
from inflash.tools.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs, and so the children of tests, ignore
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("batch"), num_hidden_layers=1)


def write_requests(file: Path, prompts: list[list[int]], **body: Any) -> None:
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, "temperature": 0, **body}}
        for i, prompt in enumerate(prompts)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def command(folder: Path, store: Store, *flags: str) -> list[str]:
    files = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--model", str(store.path)]
    return ["run-batch", *files, "--predictor", "exact", "--queue-depth", "1", *flags]


def answers(folder: Path, name: str = "out.jsonl") -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines), "a custom_id was answered twice"
    return found


def status(folder: Path) -> str:
    return json.loads((folder / "out.jsonl.job.json").read_text(encoding="utf-8"))["status"]


def test_bad_requests_are_refused_and_the_others_run(store: Store, tmp_path: Path) -> None:
    too_long, unknown_id = [5] * store.config.max_positions, [store.config.vocab_size]
    write_requests(tmp_path / "in.jsonl", [[5, 6], too_long, unknown_id], max_tokens=3)
    assert cli.main(command(tmp_path, store, "--error-file", str(tmp_path / "err.jsonl"))) == 0
    assert answers(tmp_path).keys() == {"r0"}
    refused = answers(tmp_path, "err.jsonl")
    assert {custom_id: line["response"]["status_code"] for custom_id, line in refused.items()} == {"r1": 400, "r2": 400}
    assert status(tmp_path) == "completed"


def test_a_finished_job_is_kept_and_not_mixed_with_another(store: Store, tmp_path: Path, capsys) -> None:
    write_requests(tmp_path / "in.jsonl", [[5, 6], [7]], max_tokens=3)
    assert cli.main(command(tmp_path, store)) == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    assert cli.main(command(tmp_path, store, "--loaders", "1", "--max-num-seqs", "1")) == 0
    assert cli.main(command(tmp_path, store, "--cache-neurons", "0.5")) == 2
    assert "cache_neurons (was 0.25, is 0.5)" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_nonsense_scores_fail_their_requests(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    weights["model.decoder.layers.0.fc1.bias"][:] = np.inf
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.warns(UserWarning, match="contains NaN or infinite"):
        store = convert_quietly(tmp_path / "checkpoint", tmp_path / "store")
    write_requests(tmp_path / "in.jsonl", [[5, 6]], max_tokens=3, logprobs=1)
    assert cli.main(command(tmp_path, store)) == 0
    assert answers(tmp_path)["r0"]["error"]["code"] == "model_error"


@pytest.mark.parametrize("event", ["interrupt", "loader killed"])
def test_what_is_finished_survives_and_the_rest_follows(store: Store, tmp_path: Path, event: str) -> None:
    prompts = [[number % 100] for number in range(3000)]
    write_requests(tmp_path / "in.jsonl", prompts, max_tokens=2)
    out = tmp_path / "out.jsonl"
    started = [sys.executable, "-c", HEARING, *command(tmp_path, store)]
    process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + WAIT_S
    while not (out.exists() and out.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if event == "interrupt":
        process.send_signal(signal.SIGINT)
    else:
        loaders = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(loaders[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=WAIT_S)
    kept = answers(tmp_path)
    assert 0 < len(kept) < len(prompts), errors
    assert "Traceback" not in errors
    assert (process.returncode, status(tmp_path)) == ((130, "cancelled") if event == "interrupt" else (1, "failed"))
    done = subprocess.run(started, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    after = answers(tmp_path)
    assert len(after) == len(prompts)
    assert all(after[custom_id] == line for custom_id, line in kept.items())
