"""The embedded model's training, at a size that trains in a second."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BUFFERED, byte_tokenizer, convert_quietly

from inflash import LLM
from inflash.tools import demo_corpus, train_demo
from inflash.tools.demo_export import ModelFacts, export
from inflash.tools.demo_network import DemoConfig, Parameters, forward, initial_parameters

TINY = DemoConfig(vocab_size=300, d_model=32, d_ff=64, num_layers=2, num_heads=2, max_positions=32)
STEPS = 6


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch):
    """Makes an output folder that has its tokenizer and tokens already."""
    monkeypatch.setattr(train_demo, "CHECKPOINT_STEPS", 2)
    tokens = np.random.default_rng().integers(0, TINY.vocab_size, 4000).astype(np.uint16)

    def make(folder: Path) -> Path:
        folder.mkdir()
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        np.save(folder / "train_tokens.npy", tokens)
        np.save(folder / "validation_tokens.npy", tokens[::-1])
        return folder

    return make


def train(folder: Path) -> Parameters:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes dtypes
        return train_demo.train(folder, TINY, STEPS, 2, 0)


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path, prepare, monkeypatch, capfd) -> None:
    whole = train(prepare(tmp_path / "whole"))
    folder, sample = prepare(tmp_path / "cut"), train_demo.sample_rows
    drawn = []

    def interrupt(*arguments):
        drawn.append(1)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(train_demo, "sample_rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(folder)
    monkeypatch.setattr(train_demo, "sample_rows", sample)
    resumed = train(folder)
    assert "resumed at step 4" in capfd.readouterr().out
    assert whole.keys() == resumed.keys()
    started = initial_parameters(jax.random.key(0), TINY)
    for name, values in whole.items():
        np.testing.assert_array_equal(np.asarray(values), np.asarray(resumed[name]))
        assert not np.array_equal(values, started[name]), f"{name} was not trained"


@pytest.mark.filterwarnings(BUFFERED)
def test_the_engine_computes_what_was_trained(tmp_path, prepare) -> None:
    """The training's own forward pass, and the exported checkpoint through conversion and engine, on the same rounded weights."""
    folder = prepare(tmp_path / "out")
    parameters = initial_parameters(jax.random.key(int(np.random.default_rng().integers(2**31))), TINY)
    rounded = {name: value.astype("bfloat16").astype("float32") for name, value in parameters.items()}
    facts = ModelFacts(
        steps=1, trained_tokens=1, stream_tokens=1, seed=0, validation_loss=2.0, validation_tokens=1, zeros=[0.9, 0.95]
    )
    export(folder / "model", parameters, TINY, folder / "tokenizer.json", facts)
    assert "90.0 %" in (folder / "model" / "README.md").read_text(encoding="utf-8")
    store = convert_quietly(folder / "model", tmp_path / "store")
    token_ids = np.random.default_rng().integers(0, TINY.vocab_size, 20).astype(np.int32)
    expected, activations = forward(rounded, jnp.asarray(token_ids[None]), TINY)
    assert len(activations) == TINY.num_layers
    with LLM(store.path, ffn="resident", compute_dtype="float32", max_num_seqs=1, loaders=1, queue_depth=1) as llm:
        np.testing.assert_allclose(llm.logits(token_ids), np.asarray(expected)[0], rtol=0, atol=1e-4)


def test_the_corpus_keeps_tests_apart() -> None:
    training, held_out = (set(demo_corpus.source_files(held_out)) for held_out in (False, True))
    assert training and held_out and not training & held_out
    assert any(path.name == "test_json" or "test_json" in path.parts for path in held_out)
    assert any(path.parts[-2:] == ("json", "decoder.py") for path in training)
