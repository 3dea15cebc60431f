"""Small stores to test with: neurons of random bits, or whole random models, converted.

Axes: F d_ff, P parts of a bundle, D d_model.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from opt_checkpoints import write_opt_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from inflash.storage.checkpoint import CheckpointSource, open_source
from inflash.storage.convert import convert
from inflash.storage.layout import DTYPES
from inflash.storage.model_config import ModelConfig
from inflash.storage.store import Store, open_store, writing_store

BUFFERED = "ignore:.*direct I/O is refused:RuntimeWarning"
"""For `pytest.mark.filterwarnings`: rows of these models are often shorter than a sector."""

DIRECT: dict[str, Any] = {"hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "max_position_embeddings": 512}
"""Sizes whose float32 rows are whole sectors, so that reads pass the page cache by where the disk allows it."""


def fresh_seed() -> int:
    """A new one at every run; pytest shows it when a test fails."""
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    return seed


def model_config(*, d_model: int = 64, d_ff: int = 128, num_layers: int = 2) -> ModelConfig:
    return ModelConfig(
        family="opt",
        vocab_size=128,
        d_model=d_model,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=1,
        max_positions=64,
        embed_dim=d_model,
        position_offset=2,
    )


def write_neurons(
    path: Path, *, dtype: str = "float32", d_model: int = 64, d_ff: int = 128, num_layers: int = 2
) -> tuple[Store, list[np.ndarray]]:
    """A store of neurons only, of random bits, and each layer's bundles [F, P, D]."""
    rng = np.random.default_rng(fresh_seed())
    config = model_config(d_model=d_model, d_ff=d_ff, num_layers=num_layers)
    item = DTYPES[dtype].itemsize
    layers = []
    with writing_store(path, config, dtype, "random bits") as writer:
        for layer in range(num_layers):
            bits = rng.integers(0, 256, (d_ff, config.num_parts, d_model * item), np.uint8)
            layers.append(bits.view(DTYPES[dtype]))
            writer.write_neurons(layer, iter(np.array_split(layers[-1], rng.integers(1, 4))))
    return open_store(path), layers


def convert_quietly(source: Path, destination: Path, **options: Any) -> Store:
    """Converts; tiny rows are checked through the page cache, which is no news here."""
    with open_source(source) as checkpoint:
        return convert_quietly_from(checkpoint, destination, **options)


def convert_quietly_from(source: CheckpointSource, destination: Path, **options: Any) -> Store:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*direct I/O is refused", category=RuntimeWarning)
        return convert(source, destination, **options)


def make_store(folder: Path, *, tokenizer: bool = False, predictor_rank: int | None = None, **checkpoint: Any) -> Store:
    """A random model in `folder / "store"`, from the checkpoint that stays in `folder / "checkpoint"`.

    Args:
      folder: made when it does not exist.
      tokenizer: whether the model has one: a token a byte.
      predictor_rank: see `convert`.
      checkpoint: see `write_opt_checkpoint`; the seed is new unless given.
    """
    source = folder / "checkpoint"
    if tokenizer:
        checkpoint |= {"vocab_size": VOCAB_SIZE, "bos_token_id": END, "eos_token_id": END, "pad_token_id": PADDING}
    checkpoint.setdefault("seed", fresh_seed())
    write_opt_checkpoint(source, **checkpoint)
    if tokenizer:
        byte_tokenizer().save(str(source / "tokenizer.json"))
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return convert_quietly(source, folder / "store", predictor_rank=predictor_rank)


PADDING, END, FIRST_BYTE = 0, 1, 2
VOCAB_SIZE = 258


def byte_tokenizer() -> Tokenizer:
    """A token a byte, after the padding and the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PADDING, "</s>": END} | {character: FIRST_BYTE + n for n, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    return tokenizer


def flip_byte(file: Path, offset: int) -> None:
    """Changes one byte of a file, in place."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        (byte,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))
