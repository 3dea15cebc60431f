"""`inflash synth`: what is planted is what `inflash eval` finds."""

import json
from pathlib import Path

import pytest
from tiny_models import BUFFERED

from inflash.tools.cli import main

pytestmark = pytest.mark.filterwarnings(BUFFERED)

CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "ffn_dim": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


def test_eval_finds_what_was_planted(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert main(["synth", str(store), "--like", str(config), "--active", "0.06", "--rank", "32"]) == 0
    assert "its text means nothing" in capsys.readouterr().out
    command = ["eval", str(store), "--text", str(store / "sample.txt"), "--tokens", "1000", "--json"]
    assert main([*command, "--predictor", "planted", "--predictor", "planted-ahead"]) == 0
    found = json.loads(capsys.readouterr().out)
    planted, ahead = found["predictors"]["planted"], found["predictors"]["planted-ahead"]
    assert planted["active"] == pytest.approx(0.06, rel=0.15)
    assert planted["recall"] > 0.975 and ahead["recall"] > 0.93
    assert planted["predicted"] < 1.7 * planted["active"]
    assert planted["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=0.01)
    assert all(layer["rank"] == 32 for layer in planted["layers"])


def test_persistence_is_what_repeats(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlaps = []
    for persistence in ("0.3", "0.7"):
        store = tmp_path / persistence
        assert main(["synth", str(store), "--like", str(config), "--rank", "32", "--persistence", persistence]) == 0
        capsys.readouterr()
        assert main(["eval", str(store), "--text", str(store / "sample.txt"), "--tokens", "500", "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)["predictors"]["planted"]
        overlaps.append(sum(layer["overlap"] for layer in figures["layers"]) / 2)
    assert overlaps[0] + 0.15 < overlaps[1] < 0.9


def test_greedy_text_does_not_run_in_circles(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert main(["synth", str(store), "--like", str(config), "--rank", "32"]) == 0
    capsys.readouterr()
    command = ["generate", str(store), "--prompt", " bada", "--max-tokens", "60", "--temperature", "0", "--ignore-eos", "--json"]
    assert main([*command, "--loaders", "1"]) == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    (choice,) = output["outputs"]
    assert len(set(choice["token_ids"])) > 40


def test_a_hugging_face_checkpoint(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", str(tmp_path / "checkpoint"), "--like", str(config), "--rank", "8", "--hf"]) == 0
    assert f"next: inflash convert {tmp_path / 'checkpoint'} DST" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "checkpoint"), str(tmp_path / "store")]) == 0
    assert main(["verify", str(tmp_path / "store")]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--like", "opt-7b"],
            "--like: expected one of opt-125m, opt-1.3b, opt-2.7b, opt-6.7b, opt-13b, opt-30b, opt-66b, or an OPT",
        ),
        (["--active", "2"], "--active: expected a share from 0.001 to 0.5, found 2.0"),
        (["--rank", "0"], "--rank: expected 1 to d_model = 256, found 0"),
        (["--persistence", "1.5"], "--persistence: expected 0."),
    ],
)
def test_bad_input_is_one_sentence(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["synth", str(tmp_path / "store"), *([] if "--like" in flags else ["--like", str(config)]), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [config]


def test_an_existing_store_stays(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").mkdir()
    for extra in ([], ["--hf"]):
        assert main(["synth", str(tmp_path / "store"), "--like", str(config), "--rank", "8", *extra]) == 2
        assert "already exists" in capsys.readouterr().err
    assert list((tmp_path / "store").iterdir()) == []
