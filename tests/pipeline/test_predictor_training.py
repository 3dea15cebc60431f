"""Training of predictors: what it finds, what a kill leaves, and what it refuses."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opt_checkpoints import write_opt_checkpoint
from safetensors.numpy import save_file
from tiny_models import BUFFERED, convert_quietly, fresh_seed

from inflash.errors import InflashError, RunError
from inflash.pipeline import predictor_training
from inflash.pipeline.evaluation import evaluate
from inflash.pipeline.predictor_fit import Fit, FitOptions, rank_ladder
from inflash.pipeline.predictor_training import TrainingOptions, train_predictor
from inflash.pipeline.text_windows import TextWindows, windows_of
from inflash.storage.predictor_store import add_predictor, load_predictor_layer, partial_folder
from inflash.storage.scratch import WindowArray
from inflash.storage.store import Store, open_store
from inflash.storage.verify import find_faults

pytestmark = pytest.mark.filterwarnings(BUFFERED)

D_MODEL, D_FF, LAYERS, CONTEXT, PLANTED_RANK = 128, 512, 2, 32, 16
SIZES: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "ffn_dim": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}
NOISE = 0.1


class Silent:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.layers_done, self.tokens, self.words, self.fits = -1, 0, [], []

    def began(self, windows: TextWindows, done: Sequence[tuple[int, str, dict[str, Any]]]) -> None:
        self.layers_done = len({layer for layer, _, _ in done})
        self.fits += done

    def collected(self, tokens: int) -> None:
        self.tokens += tokens

    def doing(self, words: str) -> None:
        self.words.append(words)

    def finished(self, layer: int, name: str, fit: dict[str, Any]) -> None:
        self.fits.append((layer, name, fit))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A model whose up projections have rank 16, but for noise of a tenth of their size, and about 7 % active neurons."""
    folder = tmp_path_factory.mktemp("planted")
    seed = fresh_seed()
    tensors = write_opt_checkpoint(folder / "checkpoint", seed=seed, **SIZES)
    rng = np.random.default_rng(seed)
    for layer in range(LAYERS):
        name = f"model.decoder.layers.{layer}.fc1"
        signal = rng.standard_normal((D_FF, PLANTED_RANK)) @ rng.standard_normal((PLANTED_RANK, D_MODEL)) / PLANTED_RANK**0.5
        up = signal + NOISE * rng.standard_normal((D_FF, D_MODEL))
        tensors[f"{name}.weight"] = (up / D_MODEL**0.5).astype(np.float32)
        tensors[f"{name}.bias"] = np.full(D_FF, -1.5, np.float32)
    save_file(tensors, folder / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    return convert_quietly(folder / "checkpoint", folder / "store", predictor_rank=0)


def text(seed: int, tokens: int, vocab_size: int) -> TextWindows:
    ids = np.random.default_rng(seed).integers(4, vocab_size, tokens)
    return windows_of(ids, bos_id=2, context=CONTEXT, source="random tokens")


@pytest.fixture(scope="module")
def windows(planted: Store) -> TextWindows:
    return text(1, 200 * (CONTEXT - 1), planted.config.vocab_size)


def copy(store: Store, folder: Path) -> Store:
    shutil.copytree(store.path, folder / "store")
    return open_store(folder / "store")


def train(store: Store, windows: TextWindows, report: Silent | None = None, **options: Any) -> Store:
    fit = FitOptions(**{"rank": PLANTED_RANK, "recall": 0.95, "batch_tokens": 128, **options.pop("fit", {})})
    options = {"name": "trained", "fit": fit, **options}
    return train_predictor(
        store, lambda: windows, {"source": windows.source, "text": windows.digest}, TrainingOptions(**options), report or Silent()
    )


def contents(store: Store, *names: str) -> dict[str, bytes]:
    return {
        f"{name}/{layer}/{key}": values.tobytes()
        for name in names
        for layer in range(LAYERS)
        for key, values in load_predictor_layer(store, name, layer, verify=True).items()
    }


def test_a_planted_rank_is_enough(planted: Store, windows: TextWindows, tmp_path: Path) -> None:
    report = Silent()
    store = train(copy(planted, tmp_path), windows, report, look_ahead=True)
    assert store.predictors.keys() == {"trained", "trained-ahead"}
    assert store.predictors["trained"].ranks == (PLANTED_RANK,) * LAYERS
    assert store.predictors["trained"].tokens == windows.num_tokens
    assert store.predictors["trained-ahead"].ahead == 1
    assert report.tokens == LAYERS * windows.num_tokens
    assert not partial_folder(store, "trained").exists()
    assert not find_faults(store)
    judged = evaluate(store, text(2, 80 * (CONTEXT - 1), store.config.vocab_size), ["trained", "trained-ahead"])
    found = judged["predictors"]["trained"]
    assert 0.02 < found["active"] < 0.2
    assert 0.935 < found["recall"] < 0.965  # calibrated for 0.95 on other text
    assert found["predicted"] < 1.5 * found["active"]
    assert found["perplexity"] == pytest.approx(judged["dense"]["perplexity"], rel=0.02)
    # The layer before knows this layer's input less well, so as much recall costs more.
    ahead = judged["predictors"]["trained-ahead"]["layers"][1]
    assert ahead["recall"] > 0.92
    assert ahead["predicted"] > found["layers"][1]["predicted"]


def test_automatic_ranks_find_the_planted_one(planted: Store, windows: TextWindows, tmp_path: Path) -> None:
    report = Silent()
    store = train(copy(planted, tmp_path), windows, report, fit={"rank": None}, most_share=0.4)
    for rank in store.predictors["trained"].ranks:
        assert PLANTED_RANK / 2 <= rank <= 2 * PLANTED_RANK
    assert any("loss" in words for words in report.words)
    for _, _, fit in report.fits:
        assert fit["recall"] >= 0.95
        assert fit["predicted"] <= 3 * fit["active"]


def test_training_beats_the_copy_that_it_begins_with(planted: Store, windows: TextWindows, tmp_path: Path) -> None:
    predicted = {}
    store = copy(planted, tmp_path)
    for method in ("trained", "weighted-svd", "sign-bits"):
        report = Silent()
        store = train(store, windows, report, name=method, fit={"method": method, "rank": None if method == "sign-bits" else 12})
        predicted[method] = sum(fit["predicted"] for _, _, fit in report.fits)
    assert predicted["trained"] < predicted["weighted-svd"] < predicted["sign-bits"]
    assert store.predictors["sign-bits"].ranks == ()


class Killed(BaseException):
    """In place of a kill: nothing catches it, and nothing is tidied up."""


@pytest.fixture(scope="module")
def fewer(windows: TextWindows) -> TextWindows:
    return replace(windows, token_ids=windows.token_ids[:80])


@pytest.fixture(scope="module")
def uninterrupted(planted: Store, fewer: TextWindows, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return train(copy(planted, tmp_path_factory.mktemp("whole")), fewer, look_ahead=True)


@pytest.mark.parametrize("place", ["collecting", "saving", "between the two", "installing"])
def test_a_killed_training_ends_as_an_uninterrupted_one(
    planted: Store, fewer: TextWindows, uninterrupted: Store, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = copy(planted, tmp_path)
    calls, method = 0, {"collecting": "_collect", "saving": "_save", "between the two": "_save", "installing": "_install"}[place]
    original = getattr(predictor_training._Training, method)
    install = predictor_training.install_predictor

    def interrupted(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if place == "between the two" and calls == 4:  # layer 1: the first predictor is saved, the second is not
            raise Killed
        if place == "installing":
            monkeypatch.setattr(predictor_training, "install_predictor", die_at_second)
        result = original(self, *arguments)
        if place in ("collecting", "saving") and calls == 2:
            raise Killed
        return result

    def die_at_second(store: Store, name: str, *arguments: Any, **options: Any) -> Store:
        if name != "trained":
            raise Killed
        return install(store, name, *arguments, **options)

    monkeypatch.setattr(predictor_training._Training, method, interrupted)
    with pytest.raises(Killed):
        train(cut, fewer, look_ahead=True)
    monkeypatch.undo()
    assert "trained-ahead" not in open_store(cut.path).predictors
    report = Silent()

    def never() -> TextWindows:
        raise AssertionError("the unfinished run has the text")

    fit = FitOptions(rank=PLANTED_RANK, recall=0.95, batch_tokens=128)
    options = TrainingOptions(name="trained", fit=fit, look_ahead=True)
    resumed = train_predictor(open_store(cut.path), never, {"source": fewer.source, "text": fewer.digest}, options, report)
    assert [(layer, name) for layer, name, _ in report.fits] == [
        (n, f"trained{end}") for n in range(LAYERS) for end in ("", "-ahead")
    ]
    assert report.layers_done == {"collecting": 1, "saving": 0, "between the two": 1, "installing": 2}[place]
    assert contents(resumed, "trained", "trained-ahead") == contents(uninterrupted, "trained", "trained-ahead")
    assert resumed.predictors == uninterrupted.predictors


def test_an_unfinished_run_with_other_settings_is_not_continued(
    planted: Store, windows: TextWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy(planted, tmp_path)
    windows = replace(windows, token_ids=windows.token_ids[:16])
    monkeypatch.setattr(predictor_training._Training, "_save", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        train(store, windows)
    monkeypatch.undo()
    with pytest.raises(InflashError, match=r"other settings \(recall 0.95, now 0.9\).*--restart"):
        train(store, windows, fit={"recall": 0.9})
    again = train(store, windows, fit={"recall": 0.9}, restart=True)
    assert again.predictors["trained"].recall == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": {"rank": D_MODEL + 1}}, "rank: expected auto, or 1 to d_model = 128, found 129"),
        ({"fit": {"recall": 1.0}}, "recall: expected a share between 0 and 1"),
        ({"fit": {"method": "magic"}}, "method should be one of trained, weighted-svd, sign-bits"),
        ({"most_share": 0.0}, "most share: expected"),
        ({"name": "exact"}, "predictor name: expected"),
        ({"name": "../evil"}, "predictor name: expected"),
    ],
)
def test_bad_settings_are_refused(planted: Store, windows: TextWindows, options: dict[str, Any], message: str) -> None:
    before = sorted(planted.path.parent.rglob("*"))
    with pytest.raises(InflashError, match=message):
        train(planted, windows, **options)
    left = {path for path in sorted(planted.path.parent.rglob("*")) if path not in before}
    assert left <= {planted.path / "predictors"}


def test_a_kill_while_dropping_old_work_leaves_nothing_to_go_on_with(
    planted: Store, fewer: TextWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays that are half gone read as zeros: a run that went on with them would train on nothing."""
    store = copy(planted, tmp_path)
    monkeypatch.setattr(predictor_training._Training, "_install", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        train(store, fewer)
    monkeypatch.undo()
    removed = []

    def die_at_second(path: Path, **_: Any) -> None:
        removed.append(path)
        if len(removed) == 2:
            raise Killed

    monkeypatch.setattr(predictor_training.shutil, "rmtree", die_at_second)
    monkeypatch.setattr(predictor_training.np, "save", lambda *_, **__: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        train(store, fewer, restart=True)
    monkeypatch.undo()
    report = Silent()
    train(store, fewer, report)
    assert report.layers_done == 0 and report.tokens == LAYERS * fewer.num_tokens


def test_an_array_of_an_earlier_step_that_is_gone_is_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected an array of an earlier step, found none; give --restart"):
        WindowArray(tmp_path / "hidden_1", (1, 2, 3), "float32")


def test_a_name_that_was_taken_meanwhile_is_not_replaced(
    planted: Store, fewer: TextWindows, uninterrupted: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy(planted, tmp_path)
    monkeypatch.setattr(predictor_training._Training, "_install", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        train(store, fewer, look_ahead=True)
    monkeypatch.undo()
    info = uninterrupted.predictors["trained"]
    layers = [load_predictor_layer(uninterrupted, "trained", layer) for layer in range(LAYERS)]
    other = add_predictor(store, "trained-ahead", info, iter(layers))
    with pytest.raises(InflashError, match="there is a predictor 'trained-ahead' already"):
        train(other, fewer, look_ahead=True)
    assert open_store(store.path).predictors == {"trained-ahead": info}
    assert train(other, fewer, look_ahead=True, replace=True).predictors["trained-ahead"].ahead == 1


def test_a_budget_that_is_too_small_is_told(planted: Store, fewer: TextWindows, tmp_path: Path) -> None:
    with pytest.raises(InflashError, match="most share: expected room for rank 1 at least"):
        train(copy(planted, tmp_path / "none"), fewer, fit={"rank": None}, most_share=0.001)
    with pytest.warns(RuntimeWarning, match=r"trained: .* rank \d+ was the largest within most_share 0.02") as told:
        train(copy(planted, tmp_path / "little"), fewer, fit={"rank": None, "recall": 0.999}, most_share=0.02)
    assert len(told) == LAYERS


def test_a_full_disk_is_noticed_before_it_is_full(
    planted: Store, windows: TextWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy(planted, tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InflashError, match=r"the pairs of a layer need up to .* found 0.00 GiB free"):
        train(store, windows)
    assert not partial_folder(store, "trained").exists()


def test_a_layer_that_is_never_active(planted: Store, windows: TextWindows, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    tensors = write_opt_checkpoint(folder, **SIZES)
    tensors["model.decoder.layers.0.fc1.bias"][:] = -1e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store = convert_quietly(folder, tmp_path / "store", predictor_rank=0)
    report = Silent()
    store = train(store, replace(windows, token_ids=windows.token_ids[:9]), report)
    fit = report.fits[0][2]
    assert (fit["active"], fit["predicted"], fit["recall"]) == (0, 0, 1)
    json.dumps(evaluate(store, windows_of(np.arange(31), bos_id=2, context=CONTEXT, source=""), ["trained"]), allow_nan=False)


def test_what_counts_as_few_enough() -> None:
    def fit(active: float, predicted: float) -> bool:
        made = Fit(tensors={}, rank=1, loss=None, recall=1.0, active=active, predicted=predicted)
        return made.does(FitOptions(most_predicted=3.0))

    assert fit(0.05, 0.15) and not fit(0.05, 0.16)
    assert fit(0.5, 0.62) and not fit(0.5, 0.63)


def test_ranks_to_try_ascend_in_steps_below_two() -> None:
    ladder = rank_ladder(4096, 1000)
    assert ladder[0] == 64 and ladder[-1] == 1000
    assert all(a < b <= 2 * a for a, b in pairwise(ladder))
    assert rank_ladder(64, 1) == [1]
