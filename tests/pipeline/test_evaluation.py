"""Judging predictors: every figure against float64 NumPy. Axes: W windows, C tokens, D d_model, F d_ff, R rank, V vocabulary."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import zarr
from opt_reference import canonical_tensors
from tiny_models import BUFFERED, fresh_seed, make_store

from inflash import LLM
from inflash.errors import InflashError
from inflash.pipeline import layerwise
from inflash.pipeline.evaluation import CURVE_RECALLS, GuessCounts, evaluate
from inflash.pipeline.layerwise import LayerOutput, LayerwisePass
from inflash.pipeline.text_windows import TextWindows, windows_of
from inflash.storage.checkpoint import open_source
from inflash.storage.layout import bundles_path, checksums_path, neuron_order_path
from inflash.storage.predictor_layout import LOW_RANK, SIGN_BITS, PredictorInfo
from inflash.storage.predictor_store import add_predictor, load_predictor_layer
from inflash.storage.sign_bits import packed_signs, sign_scale
from inflash.storage.store import Store, open_store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

NUM_LAYERS, CONTEXT, NUM_WINDOWS, BOS = 3, 20, 5, 2
NAMES = ("svd", "signs", "ahead")
SHARES = ("recall", "precision", "active", "predicted", "false_negatives", "false_positives", "overlap")
CLOSE = 1e-4  # scores this near to a threshold may be on either side of it in float32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Neurons in any order on flash, and three predictors: the converter's, signs, and a random one that looks ahead."""
    store = make_store(tmp_path_factory.mktemp("judged"), num_hidden_layers=NUM_LAYERS, bos_token_id=BOS)
    rng = np.random.default_rng(fresh_seed())
    d_model, d_ff = store.config.d_model, store.config.d_ff
    for layer in range(NUM_LAYERS):
        order = rng.permutation(d_ff)
        for path in (bundles_path(layer), checksums_path(layer), neuron_order_path(layer)):
            array = zarr.open_array(str(store.path / path), mode="r+")
            array[:] = np.asarray(array[:])[order]
    with open_source(store.path.parent / "checkpoint") as source:
        weights = canonical_tensors(source)["layers"]

    def signs() -> Iterator[dict[str, np.ndarray]]:
        for layer in range(NUM_LAYERS):
            up, threshold = weights[str(layer)]["up"], np.full(1, 0.1 * layer, np.float32)
            bias = weights[str(layer)]["up_bias"]
            yield {"signs": packed_signs(up), "scale": sign_scale(up), "bias": bias, "threshold": threshold}

    def ahead() -> Iterator[dict[str, np.ndarray]]:
        for rank in ranks:
            first, second = rng.standard_normal((rank, d_model)), rng.standard_normal((d_ff, rank))
            yield {"first": first, "second": second, "bias": rng.standard_normal(d_ff), "threshold": np.ones(1)}

    store = add_predictor(store, "signs", PredictorInfo(kind=SIGN_BITS, method="sign_bits"), signs())
    ranks = (8, 3, 5)
    return add_predictor(store, "ahead", PredictorInfo(kind=LOW_RANK, method="random", ranks=ranks, ahead=1), ahead())


@pytest.fixture(scope="module")
def windows(store: Store) -> TextWindows:
    tokens = np.random.default_rng(fresh_seed()).integers(3, store.config.vocab_size, NUM_WINDOWS * (CONTEXT - 1) + 7)
    return windows_of(tokens, bos_id=BOS, context=CONTEXT, source="random tokens")


@pytest.fixture(scope="module")
def progress() -> list[int]:
    return []


@pytest.fixture(scope="module")
def document(store: Store, windows: TextWindows, progress: list[int]) -> dict[str, Any]:
    """In groups of two windows, the last of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise, "GROUP_TOKENS", 2 * CONTEXT)
        return evaluate(store, windows, NAMES, progress=progress.append)


@pytest.fixture(scope="module")
def dense(store: Store, windows: TextWindows) -> list[LayerOutput]:
    """Each layer's outputs for all windows."""
    outputs = []
    with LayerwisePass(store, CONTEXT, loaders=1, queue_depth=2) as model:
        hidden = model.embed(windows.token_ids)
        for layer in range(NUM_LAYERS):
            with model.attention(layer) as weights:
                outputs.append(model.run(layer, weights, hidden))
            hidden = outputs[-1].hidden
    return outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """One layer's, [W, C, F]: float64 scores, the threshold, and the truth."""

    scores: np.ndarray
    threshold: float
    active: np.ndarray

    @property
    def named(self) -> np.ndarray:
        return self.scores > self.threshold

    @property
    def unclear(self) -> int:
        return int((np.abs(self.scores - self.threshold) < CLOSE).sum())

    def counts(self) -> dict[str, tuple[int, int]]:
        """Each share as (of these, so many)."""
        named, active = self.named, self.active
        return {
            "recall": ((named & active).sum(), active.sum()),
            "precision": ((named & active).sum(), named.sum()),
            "active": (active.sum(), active.size),
            "predicted": (named.sum(), named.size),
            "false_negatives": ((~named & active).sum(), active.sum()),
            "false_positives": ((named & ~active).sum(), (~active).sum()),
            "overlap": ((named[:, 1:] & named[:, :-1]).sum(), named[:, 1:].sum()),
        }

    def curve(self) -> np.ndarray:
        """[recalls, (hits, named)] at thresholds that the first window's active neurons give."""
        points = []
        for recall in CURVE_RECALLS:
            at = np.quantile(self.scores[0][self.active[0]], 1 - recall)
            points.append([(self.active & (self.scores > at)).sum(), (self.scores > at).sum()])
        return np.asarray(points)


def slow_scores(store: Store, name: str, layer: int, inputs: np.ndarray) -> tuple[np.ndarray, float]:
    """[W, C, F] from [W, C, D], float64, neurons in the order of the store; and the threshold."""
    tensors = {
        key: values.astype(np.float64) for key, values in load_predictor_layer(store, name, layer).items() if key != "signs"
    }
    if name == "signs":
        with open_source(store.path.parent / "checkpoint") as source:
            up = canonical_tensors(source)["layers"][str(layer)]["up"].astype(np.float64)
        scores = inputs @ np.where(up > 0, 1.0, -1.0).T * np.abs(up).mean(1) + tensors["bias"]
    else:
        scores = inputs @ tensors["first"].T @ tensors["second"].T + tensors["bias"]
    order = zarr.open_array(str(store.path / neuron_order_path(layer)), mode="r")[:]
    return scores[..., np.asarray(order)], float(tensors["threshold"][0])


@pytest.fixture(scope="module")
def guesses(store: Store, dense: list[LayerOutput]) -> dict[str, list[Guesses]]:
    """By predictor and layer, on the dense run's inputs; who looks ahead reads the inputs of the layer before."""
    found: dict[str, list[Guesses]] = {}
    for name in NAMES:
        for layer, output in enumerate(dense):
            read = dense[max(layer - (name == "ahead"), 0)].ffn_in
            scores, threshold = slow_scores(store, name, layer, read.astype(np.float64))
            found.setdefault(name, []).append(Guesses(scores=scores, threshold=threshold, active=output.active))
    return found


def assert_shares(figures: dict[str, float], layers: list[Guesses]) -> None:
    """Of all given layers together."""
    counts, slack = [layer.counts() for layer in layers], sum(layer.unclear for layer in layers)
    for key in SHARES:
        part, whole = (int(sum(layer[key][place] for layer in counts)) for place in (0, 1))
        assert whole > 1000
        assert figures[key] == pytest.approx(part / whole, abs=2 * slack / whole + 1e-12), key


def assert_curve(points: list[dict[str, float]], layers: list[Guesses]) -> None:
    expected = np.sum([layer.curve() for layer in layers], axis=0)
    active, pairs = sum(layer.active.sum() for layer in layers), sum(layer.active.size for layer in layers)
    found = np.asarray([[point["recall"] * active, point["predicted"] * pairs] for point in points])
    # A threshold is often the very score of a neuron, which then is on either side.
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * len(layers))
    assert (np.diff(found, axis=0) >= 0).all()
    assert found[0, 1] < found[-1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_every_layer_and_of_all(document: dict[str, Any], guesses: dict[str, list[Guesses]], name: str) -> None:
    figures = document["predictors"][name]
    assert [layer["layer"] for layer in figures["layers"]] == [0, 1, 2]
    for found, expected in zip(figures["layers"], guesses[name], strict=True):
        assert_shares(found, [expected])
        assert_curve(found["curve"], [expected])
        assert found["threshold"] == expected.threshold
    assert_shares(figures, guesses[name])
    assert_curve(figures["curve"], guesses[name])


def test_looking_ahead_is_not_looking_at_the_layer_itself(
    store: Store, document: dict[str, Any], dense: list[LayerOutput], guesses: dict[str, list[Guesses]]
) -> None:
    """The other way to count would give other figures, so the tests above can tell."""
    for layer in (1, 2):
        scores, threshold = slow_scores(store, "ahead", layer, dense[layer].ffn_in.astype(np.float64))
        own = Guesses(scores=scores, threshold=threshold, active=dense[layer].active)
        found = document["predictors"]["ahead"]["layers"][layer]["predicted"]
        assert abs(own.named.mean() - found) + (own.named != guesses["ahead"][layer].named).mean() > 0.05


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def log_shares(store: Store, windows: TextWindows, **options: Any) -> np.ndarray:
    """[W, C - 1, V] log-probabilities of the next token, by the engine."""
    with LLM(store.path, loaders=1, queue_depth=2, **options) as llm:
        return log_softmax(np.stack([llm.logits(window)[:-1] for window in windows.token_ids]))


@pytest.fixture(scope="module")
def truth(store: Store, windows: TextWindows) -> np.ndarray:
    return log_shares(store, windows, ffn="hybrid")


def perplexity(log_q: np.ndarray, windows: TextWindows) -> float:
    targets = windows.token_ids[:, 1:]
    picked = [log_q[w, t, targets[w, t]] for w in range(targets.shape[0]) for t in range(targets.shape[1])]
    return math.exp(-sum(picked) / len(picked))


def test_the_dense_perplexity(document: dict[str, Any], windows: TextWindows, truth: np.ndarray) -> None:
    assert document["dense"] == {"perplexity": pytest.approx(perplexity(truth, windows), rel=1e-5)}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_predictor_costs(
    store: Store, windows: TextWindows, document: dict[str, Any], truth: np.ndarray, name: str
) -> None:
    """Where all layers read what sparse layers before them have made: the engine's own sparse run."""
    log_q = log_shares(store, windows, ffn="sparse", predictor=name)
    figures = document["predictors"][name]
    divergence = (np.exp(truth) * (truth - log_q)).sum(-1)
    assert figures["perplexity"] == pytest.approx(perplexity(log_q, windows), rel=1e-4)
    assert figures["kl"] == pytest.approx(divergence.mean(), rel=1e-3, abs=1e-6)
    top = np.sort(truth, -1)
    unclear = (top[..., -1] - top[..., -2] < 1e-3).mean()
    assert figures["top1_agreement"] == pytest.approx((truth.argmax(-1) == log_q.argmax(-1)).mean(), abs=unclear + 1e-12)
    assert figures["kl"] > 1e-3 and figures["top1_agreement"] < 1  # or the comparison could not fail


def test_the_rest_of_the_document(store: Store, windows: TextWindows, document: dict[str, Any], progress: list[int]) -> None:
    assert document["model"] == str(store.path)
    assert document["text"] == "random tokens"
    assert document["tokens"] == NUM_WINDOWS * (CONTEXT - 1)
    assert document["convention"] == windows.describe()
    assert list(document["predictors"]) == list(NAMES)
    for name, figures in document["predictors"].items():
        layers = [load_predictor_layer(store, name, layer) for layer in range(NUM_LAYERS)]
        assert figures["bytes"] == sum(values.nbytes for tensors in layers for values in tensors.values())
        assert figures["method"] == store.predictors[name].method
        ranks = [None] * NUM_LAYERS if name == "signs" else [len(tensors["first"]) for tensors in layers]
        assert [layer["rank"] for layer in figures["layers"]] == ranks
    assert sum(progress) == (NUM_LAYERS + 1) * (1 + len(NAMES)) * windows.num_tokens
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_without_predictors_there_is_the_dense_model(store: Store, windows: TextWindows, document: dict[str, Any]) -> None:
    """And windows in one group give the same as in several."""
    alone = evaluate(store, windows, [])
    assert alone["predictors"] == {}
    assert alone["dense"]["perplexity"] == pytest.approx(document["dense"]["perplexity"], rel=1e-6)


def test_an_unknown_predictor_is_refused(store: Store, windows: TextWindows) -> None:
    message = rf"{store.path}: expected one of its predictors \(svd, signs, ahead\), found 'oracle'"
    with pytest.raises(InflashError, match=message):
        evaluate(open_store(store.path), windows, ["svd", "oracle"])


def count(*guesses: tuple[Sequence[Sequence[float]], Sequence[Sequence[int]]]) -> GuessCounts:
    """Windows of scores and active neurons, at a threshold of 0.5."""
    counts = GuessCounts()
    for scores, active in guesses:
        counts.add(np.asarray(scores, np.float32), 0.5, np.asarray(active, bool))
    return counts


def test_counts_by_hand() -> None:
    """Two windows; the last token of the first and the first of the second do not follow each other."""
    counts = count(([[1, 1, 0, 0], [1, 0, 1, 0]], [[1, 0, 0, 1], [1, 0, 0, 0]]), ([[1, 0.5, 0, 9]], [[0, 1, 0, 1]]))
    assert (counts.pairs, counts.active, counts.named, counts.hits) == (12, 5, 6, 3)
    assert (counts.repeated, counts.repeatable) == (1, 2)
    assert counts.shares() == {
        "recall": 3 / 5,
        "precision": 3 / 6,
        "active": 5 / 12,
        "predicted": 6 / 12,
        "false_negatives": pytest.approx(2 / 5),
        "false_positives": 3 / 7,
        "overlap": 1 / 2,
    }


def test_a_perfect_guess() -> None:
    shares = count(([[1, 0], [1, 0]], [[1, 0], [1, 0]])).shares()
    assert shares == {
        "recall": 1,
        "precision": 1,
        "active": 0.5,
        "predicted": 0.5,
        "false_negatives": 0,
        "false_positives": 0,
        "overlap": 1,
    }


@pytest.mark.parametrize(
    ("scores", "active", "expected"),
    [
        ([[0, 0]], [[0, 0]], {"recall": 1, "precision": 1, "active": 0, "predicted": 0, "false_positives": 0}),
        ([[1, 0]], [[0, 0]], {"recall": 1, "precision": 0, "active": 0, "predicted": 0.5, "false_positives": 0.5}),
        ([[0, 0]], [[1, 0]], {"recall": 0, "precision": 1, "active": 0.5, "predicted": 0, "false_positives": 0}),
        ([[1, 1]], [[1, 1]], {"recall": 1, "precision": 1, "active": 1, "predicted": 1, "false_positives": 0}),
    ],
    ids=["nothing", "nothing active", "nothing named", "all"],
)
def test_nothing_to_divide_by(scores: list[list[float]], active: list[list[int]], expected: dict[str, float]) -> None:
    counts = count((scores, active))
    shares = counts.shares()
    assert shares == expected | {"false_negatives": 1 - expected["recall"], "overlap": 0}
    points = counts.curve_points()
    assert len(points) == len(CURVE_RECALLS)
    json.dumps([shares, points], allow_nan=False)


def test_the_curve_by_hand() -> None:
    """A hundred active neurons with scores 0 to 99, and an inactive one above each; the threshold of the counts plays no part."""
    scores = np.concatenate([np.arange(100), np.arange(100) + 0.5])[None]
    active = (np.arange(200) < 100)[None]
    points = count((scores.tolist(), active.astype(int).tolist())).curve_points()
    assert [point["recall"] for point in points] == pytest.approx(CURVE_RECALLS, abs=0.0101)
    for point in points:
        assert point["predicted"] == pytest.approx(point["recall"], abs=0.0051)


def test_the_curve_leaves_out_windows_before_the_first_active_neuron() -> None:
    """There is no threshold to count them by, so they are not among its pairs either; later silent windows are."""
    silent, spoken = ([[9.0] * 50], [[0] * 50]), ([[*range(50)]], [[1] * 10 + [0] * 40])
    assert count(silent, spoken).curve_points() == count(spoken).curve_points()
    assert count(silent, spoken).shares()["active"] == count(spoken).shares()["active"] / 2
    assert count(spoken, silent).curve_points()[0]["predicted"] > count(spoken).curve_points()[0]["predicted"]
