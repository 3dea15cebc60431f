"""`inflash train-predictor` and `inflash eval` as a user runs them."""

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
from tiny_models import BUFFERED, fresh_seed, make_store

from inflash.storage.predictor_store import load_predictor_layer
from inflash.storage.store import Store, open_store
from inflash.tools import cli

pytestmark = [pytest.mark.filterwarnings(BUFFERED), pytest.mark.integration]

CONTEXT = "32"
QUICK = ("--context", CONTEXT, "--rank", "8", "--recall", "0.9")
WAIT_S = 120


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("model"), tokenizer=True, num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["sea", "hill", "näive", "for", "the", "x = 1\n"]
    rng = np.random.default_rng(fresh_seed())
    file.write_text(" ".join(rng.choice(words, 2000)), encoding="utf-8")
    return file


def own_copy(store: Store, folder: Path) -> Path:
    copy = folder / "own.inflash"
    subprocess.run(["cp", "-r", str(store.path), str(copy)], check=True)
    return copy


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_from_text_to_a_judged_predictor(store: Store, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = own_copy(store, tmp_path)
    assert cli.main(["train-predictor", str(model), "--text", str(text), "--tokens", "1500", *QUICK, "--json"]) == 0
    made = printed(capsys)["predictors"]["trained"]
    assert made["ranks"] == [8, 8] and made["recall"] == 0.9 and made["tokens"] == 1519  # 49 windows of 31

    plot = tmp_path / "eval.png"
    judged = ["eval", str(model), "--text", str(text), "--tokens", "900", "--context", CONTEXT, "--plot", str(plot)]
    assert cli.main([*judged, "--decode", "4", "--json"]) == 0
    document = printed(capsys)
    assert document["predictors"].keys() == {"svd", "trained"}
    assert document["tokens"] == 930 and "stride 31" in document["convention"]
    for figures in document["predictors"].values():
        assert figures["bytes"] > 0 and figures["ms_per_token"] > 0
        assert [layer["layer"] for layer in figures["layers"]] == [0, 1]
    assert plot.read_bytes().startswith(b"\x89PNG")

    assert cli.main([*judged[:6], "--context", CONTEXT, "--predictor", "trained"]) == 0
    assert "same top token" in (shown := capsys.readouterr().out) and "trained:" in shown and "svd" not in shown


@pytest.mark.parametrize("method", ["weighted-svd", "sign-bits"])
def test_without_text_the_model_writes_its_own(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    model = own_copy(store, tmp_path)
    rank = [] if method == "sign-bits" else ["--rank", "8"]
    command = [
        "train-predictor",
        str(model),
        "--method",
        method,
        "--tokens",
        "300",
        "--context",
        CONTEXT,
        "--recall",
        "0.9",
        *rank,
    ]
    assert cli.main(command) == 0
    assert f"added to {model}: {method}" in capsys.readouterr().out
    assert open_store(model).predictors[method].tokens == 310
    assert cli.main(["generate", str(model), "--predictor", method, "--prompt", "sea", "--max-tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected some text, found an empty file"),
        (b"caf\xe9 " * 200, "expected UTF-8 text, found other bytes"),
        (b"short", "expected at least {least} window"),
        (None, "this text file cannot be read: No such file or directory"),
    ],
    ids=["empty", "latin-1", "short", "missing"],
)
@pytest.mark.parametrize("command", ["train-predictor", "eval"])
def test_bad_text_is_one_sentence(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: bytes | None, message: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert cli.main([command, str(store.path), "--text", str(file), "--context", CONTEXT]) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint.startswith(f"inflash: error: {file}: " if "{" not in message else "inflash: error: text: ")
    assert message.format(least=2 if command == "train-predictor" else 1) in complaint
    assert len(complaint.splitlines()) == 1
    assert not list(store.path.glob("predictors/.*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "1"], "--context: expected 2 to the model's 64 positions, found 1"),
        (["--context", "65"], "--context: expected 2 to the model's 64 positions, found 65"),
        (["--name", "svd"], "there is a predictor 'svd' already"),
        (["--recall", "1.5"], "recall: expected a share between 0 and 1"),
        (["--tokens", "0"], "--tokens: expected at least 1, found 0"),
    ],
)
def test_bad_flags_are_one_sentence(
    store: Store, text: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["train-predictor", str(store.path), "--text", str(text), *flags]) == 2
    assert message in capsys.readouterr().err


def test_kill_9_in_the_middle_changes_nothing(store: Store, text: Path, tmp_path: Path) -> None:
    """A process killed when the first layer is done, then the same command again: the weights of an uninterrupted run."""
    (tmp_path / "whole").mkdir()
    whole, cut = own_copy(store, tmp_path / "whole"), own_copy(store, tmp_path)
    flags = ["--text", str(text), "--tokens", "6000", *QUICK]
    assert cli.main(["train-predictor", str(whole), *flags]) == 0
    command = [sys.executable, "-m", "inflash.tools.cli", "train-predictor", str(cut), *flags]
    progress = cut / "predictors" / ".trained.partial" / "progress.json"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + WAIT_S
    while not (progress.exists() and json.loads(progress.read_text())["layer"] == 1):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert "trained" not in open_store(cut).predictors
    assert cli.main(["train-predictor", str(cut), *flags]) == 0
    for layer in range(2):
        expected = load_predictor_layer(open_store(whole), "trained", layer)
        found = load_predictor_layer(open_store(cut), "trained", layer)
        assert {key: values.tobytes() for key, values in found.items()} == {
            key: values.tobytes() for key, values in expected.items()
        }
    assert not list(cut.glob("predictors/.*"))


def test_eval_wants_to_know_what_on(store: Store, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(store.path)]) == 2
    assert "expected either --text FILE or --tasks NAME, found neither" in capsys.readouterr().err
    assert cli.main(["eval", str(store.path), "--text", str(text), "--tasks", "x"]) == 2
    assert cli.main(["eval", str(store.path), "--text", str(text), "--context", CONTEXT, "--predictor", "nobody"]) == 2
    assert "expected one of its predictors (svd), found 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot", "/nowhere/at/all.png"], "--plot: /nowhere/at: this folder does not exist"),
        (["--plot", "figure.tiles"], "expected a name that ends in one of"),
        (["--decode", "9999"], "--decode: expected 1 to 63 tokens, found 9999"),
        (["--limit", "3"], "--limit does not go with --text"),
    ],
)
def test_eval_refuses_before_it_works(
    store: Store, text: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["eval", str(store.path), "--text", str(text), *flags]) == 2
    assert message in capsys.readouterr().err
