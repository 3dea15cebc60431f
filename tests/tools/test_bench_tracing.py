"""`inflash bench tracing`: how stretches are compared, and that the run behind them is real."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tiny_models import BUFFERED, make_store

from inflash.errors import InflashError
from inflash.storage.store import Store
from inflash.tools import cli
from inflash.tools.bench_tracing import overhead
from inflash.tools.profiler import Watch

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings(BUFFERED)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("model"), tokenizer=True, num_hidden_layers=12, max_position_embeddings=128)


def test_drift_and_disturbances_cancel() -> None:
    """A machine that slows down by a half, noise of 3 %, and every eighth stretch beside something else: 2 % are found."""
    rng = np.random.default_rng(5)
    stretches = []
    for number in range(400):
        watched = number % 2 == 0
        ms = 100 * (1 + number / 800) * rng.normal(1, 0.03) * (1.02 if watched else 1.0) * (2.0 if rng.random() < 0.02 else 1.0)
        stretches.append((watched, ms))
    share, error, pairs = overhead(stretches)
    assert share == pytest.approx(0.02, abs=3 * error) and 0.001 < error < 0.005 and pairs == 199


def test_too_few_stretches_are_refused() -> None:
    with pytest.raises(InflashError, match="--tokens: too few"):
        overhead([(True, 1.0), (False, 1.0), (True, 1.0)])


def test_a_real_run(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        "tracing",
        str(store.path),
        "--tokens",
        "180",  # two texts of a model with 128 positions
        "--steps",
        "1",
        "--predictor",
        "exact",
        "--queue-depth",
        "1",
    ]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["pairs"] >= 40 and found["plain_ms"] > 0 < found["watched_ms"] and found["standard_error"] >= 0
    assert found["spans_per_step"] > 12 * 6 and 0 < found["overhead_by_sum"] < 1


def test_a_run_that_fails_is_told(store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def start(_: Watch, words: list[str], **options: Any) -> subprocess.Popen:
        assert words[:2] == ["generate", str(store.path)]
        return subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.exit(2)"], **options)

    monkeypatch.setattr(Watch, "start", start)
    assert cli.main(["bench", "tracing", str(store.path)]) == 1
    assert "the run ended with 2" in capsys.readouterr().err
    assert cli.main(["bench", "tracing", str(store.path), "--tokens", "0"]) == 2
