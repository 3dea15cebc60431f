"""A model one layer at a time: the same numbers as all layers for a token. Axes: W windows, C tokens, D d_model, F d_ff, V vocabulary."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import opt_reference
import pytest
import zarr
from opt_reference import canonical_tensors, forward
from tiny_models import BUFFERED, fresh_seed, make_store

from inflash import LLM
from inflash.pipeline import plan
from inflash.pipeline.layerwise import LayerOutput, LayerwisePass
from inflash.pipeline.predictors import load_layer
from inflash.storage.checkpoint import open_source
from inflash.storage.layout import bundles_path, checksums_path, neuron_order_path
from inflash.storage.model_config import ModelConfig
from inflash.storage.store import Store, open_store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

TOLERANCE = 2e-4
CLEAR = 1e-4  # pre-activations this far from zero have the same sign in float32 and float64
MODELS = {"plain": 45, "350m": 20}
"""Variant to context: neither is a multiple of the sizes that chunks are padded to, and 45 is padded beyond the KV cache's 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A store, and some windows of tokens [W, C]."""

    store: Store
    token_ids: np.ndarray

    @property
    def tensors(self) -> dict[str, Any]:
        with open_source(self.store.path.parent / "checkpoint") as source:
            return canonical_tensors(source)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    store = make_store(tmp_path_factory.mktemp(request.param), variant=request.param, num_hidden_layers=2)
    rng = np.random.default_rng(fresh_seed())
    return Model(store=store, token_ids=rng.integers(3, store.config.vocab_size, (3, MODELS[request.param])).astype(np.int32))


@pytest.fixture(scope="module")
def opened(model: Model) -> Iterator[LayerwisePass]:
    """Blocks of a hundred neurons, of which the last is shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK_BYTES", 100 * model.store.bundles.bundle_bytes)
        with LayerwisePass(model.store, model.token_ids.shape[1], loaders=1, queue_depth=2) as opened:
            yield opened


def run_all(model: LayerwisePass, token_ids: np.ndarray, predictor: str | None = None, group: int = 99) -> list[LayerOutput]:
    """Every layer's output for all windows, given in groups."""
    hidden, outputs = model.embed(token_ids), []
    for layer in range(model.store.config.num_layers):
        guess = None if predictor is None else load_layer(model.store, predictor, layer)
        with model.attention(layer) as weights:
            parts = [model.run(layer, weights, hidden[at : at + group], guess) for at in range(0, len(hidden), group)]
        outputs.append(
            LayerOutput(**{key: np.concatenate([getattr(part, key) for part in parts]) for key in ("hidden", "ffn_in", "active")})
        )
        hidden = outputs[-1].hidden
    return outputs


@pytest.fixture(scope="module")
def dense(model: Model, opened: LayerwisePass) -> list[LayerOutput]:
    return run_all(opened, model.token_ids)


def logits_of(store: Store, token_ids: np.ndarray, **options: Any) -> np.ndarray:
    """[W, C, V] by the engine."""
    with LLM(store.path, loaders=1, queue_depth=2, **options) as llm:
        return np.stack([llm.logits(window) for window in token_ids])


def slow_layers(tensors: dict[str, Any], config: ModelConfig, token_ids: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Each layer's FFN input, pre-activations and output for one window, float64."""
    embeddings = opt_reference._float64(tensors["embeddings"])
    x = embeddings["tokens"][token_ids]
    if "project_in" in embeddings:
        x = x @ embeddings["project_in"].T
    x = x + embeddings["positions"][config.position_offset :][: len(x)]
    layers = []
    for layer in range(config.num_layers):
        weights = opt_reference._float64(tensors["layers"][str(layer)])

        def norm(x: np.ndarray, name: str, weights: dict[str, np.ndarray] = weights) -> np.ndarray:
            return opt_reference._norm(x, weights, name, config)

        if config.norm_first:
            x = x + opt_reference._attention(norm(x, "attention_norm"), weights, config)
            ffn_in = norm(x, "ffn_norm")
            x = x + opt_reference._feed_forward(ffn_in, weights, config)
        else:
            ffn_in = norm(x + opt_reference._attention(x, weights, config), "attention_norm")
            x = norm(ffn_in + opt_reference._feed_forward(ffn_in, weights, config), "ffn_norm")
        layers.append({"ffn_in": ffn_in, "inputs": ffn_in @ weights["up"].T + weights["up_bias"], "hidden": x})
    return layers


def test_logits_are_the_engines(model: Model, opened: LayerwisePass, dense: list[LayerOutput]) -> None:
    found = np.stack(opened.logits(list(dense[-1].hidden)))
    assert found.shape == (*model.token_ids.shape, model.store.config.vocab_size)
    np.testing.assert_allclose(found, logits_of(model.store, model.token_ids, ffn="hybrid"), rtol=0, atol=TOLERANCE)
    exact = np.stack([forward(model.tensors, model.store.config, window) for window in model.token_ids])
    np.testing.assert_allclose(found, exact, rtol=0, atol=TOLERANCE)


def test_every_layer_is_as_in_float64(model: Model, dense: list[LayerOutput]) -> None:
    """What neurons read, which are active, and what comes out."""
    config = model.store.config
    windows = [slow_layers(model.tensors, config, window) for window in model.token_ids]
    for layer, output in enumerate(dense):
        assert output.active.dtype == bool
        assert output.active.shape == (*model.token_ids.shape, config.d_ff)
        assert 0.2 < output.active.mean() < 0.8
        for number, window in enumerate(windows):
            expected = window[layer]
            np.testing.assert_allclose(output.ffn_in[number], expected["ffn_in"], rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(output.hidden[number], expected["hidden"], rtol=0, atol=TOLERANCE)
            clear = np.abs(expected["inputs"]) > 10 * CLEAR
            np.testing.assert_array_equal(output.active[number][clear], expected["inputs"][clear] > 0)


def test_active_is_what_the_up_projection_says_of_the_input(model: Model, dense: list[LayerOutput]) -> None:
    """From the input that is returned with it."""
    for layer, output in enumerate(dense):
        weights = model.tensors["layers"][str(layer)]
        inputs = output.ffn_in.astype(np.float64) @ weights["up"].astype(np.float64).T + weights["up_bias"]
        clear = np.abs(inputs) > CLEAR
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(output.active[clear], inputs[clear] > 0)


def test_a_predictor_does_as_in_the_engine(model: Model, opened: LayerwisePass, dense: list[LayerOutput]) -> None:
    """Each token uses the neurons that are named; which are active is told of all."""
    outputs = run_all(opened, model.token_ids, "svd")
    found = np.stack(opened.logits(list(outputs[-1].hidden)))
    expected = logits_of(model.store, model.token_ids, ffn="sparse", predictor="svd")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(outputs[-1].hidden - dense[-1].hidden).max() > 100 * TOLERANCE
    np.testing.assert_array_equal(outputs[0].active, dense[0].active)


def test_windows_know_nothing_of_each_other(model: Model, opened: LayerwisePass, dense: list[LayerOutput]) -> None:
    """In whatever groups and order they come, and whatever came before; the layers are gone through once more for it."""
    for output, again in zip(dense, run_all(opened, model.token_ids[::-1], group=2), strict=True):
        np.testing.assert_allclose(again.hidden[::-1], output.hidden, rtol=0, atol=1e-5)
        np.testing.assert_allclose(again.ffn_in[::-1], output.ffn_in, rtol=0, atol=1e-5)


def test_another_input_of_the_predictor(model: Model, opened: LayerwisePass, dense: list[LayerOutput]) -> None:
    """What it reads instead of the layer's own FFN input: with that very input nothing changes, with another one it does."""
    hidden, predictor = dense[0].hidden[:2], load_layer(model.store, "svd", 1)
    with opened.attention(1) as weights:
        own = opened.run(1, weights, hidden, predictor)
        same = opened.run(1, weights, hidden, predictor, own.ffn_in)
        other = opened.run(1, weights, hidden, predictor, dense[0].ffn_in[:2])
        swapped = opened.run(1, weights, hidden[::-1], predictor, dense[0].ffn_in[1::-1])
    np.testing.assert_allclose(same.hidden, own.hidden, rtol=0, atol=1e-5)
    assert np.abs(other.hidden - own.hidden).max() > 100 * TOLERANCE
    np.testing.assert_allclose(swapped.hidden[::-1], other.hidden, rtol=0, atol=1e-5)


def test_up_rows_and_bias_are_the_checkpoints(model: Model, opened: LayerwisePass) -> None:
    for layer in range(2):
        weights = model.tensors["layers"][str(layer)]
        np.testing.assert_array_equal(opened.up_rows(layer), weights["up"])
        np.testing.assert_array_equal(opened.up_bias(layer), weights["up_bias"])


def test_neurons_may_lie_in_any_order(
    model: Model, dense: list[LayerOutput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`active` and `up_rows` are then in the order of the store; what is computed stays the same, with a predictor, too."""
    if not model.store.config.norm_first:
        pytest.skip("one model is enough")
    d_ff, path = model.store.config.d_ff, tmp_path / "store"
    shutil.copytree(model.store.path, path)
    orders = [np.random.default_rng(fresh_seed()).permutation(d_ff) for _ in range(2)]
    for layer, order in enumerate(orders):
        for name in (bundles_path(layer), checksums_path(layer), neuron_order_path(layer)):
            array = zarr.open_array(str(path / name), mode="r+")
            array[:] = np.asarray(array[:])[order]
    monkeypatch.setattr(plan, "BLOCK_BYTES", 100 * model.store.bundles.bundle_bytes)
    with LayerwisePass(open_store(path), model.token_ids.shape[1], loaders=1, queue_depth=2) as reordered:
        outputs = run_all(reordered, model.token_ids)
        for layer, (output, before, order) in enumerate(zip(outputs, dense, orders, strict=True)):
            np.testing.assert_allclose(output.hidden, before.hidden, rtol=0, atol=1e-5)
            assert (output.active != before.active[..., order]).sum() <= 2  # those next to zero
            np.testing.assert_array_equal(reordered.up_rows(layer), model.tensors["layers"][str(layer)]["up"][order])
            np.testing.assert_array_equal(reordered.up_bias(layer), model.tensors["layers"][str(layer)]["up_bias"][order])
        sparse = run_all(reordered, model.token_ids, "svd")
        found = np.stack(reordered.logits(list(sparse[-1].hidden)))
    expected = logits_of(model.store, model.token_ids, ffn="sparse", predictor="svd")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_closing_twice_leaves_nothing(model: Model) -> None:
    opened = LayerwisePass(model.store, 16, loaders=1, queue_depth=1)
    processes = opened.engine.pool.process_ids
    opened.close()
    opened.close()
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
