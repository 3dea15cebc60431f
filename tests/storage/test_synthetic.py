"""Synthetic models: the same every time, whatever blocks they are read in, and refused where they cannot be planted."""

from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import synthetic_config
from tiny_models import convert_quietly

from inflash.errors import InflashError
from inflash.storage.convert import convert
from inflash.storage.families.opt import SIZES, config_document, model_config, named_config
from inflash.storage.huggingface_writer import write_huggingface
from inflash.storage.layout import resident_layers, resident_specs
from inflash.storage.synthetic import Planting, SyntheticSource
from inflash.storage.verify import find_faults


def source(planting: Planting | None = None, **sizes) -> SyntheticSource:
    return SyntheticSource(synthetic_config(**sizes), "a small model", planting or Planting(rank=16))


def test_blocks_do_not_matter() -> None:
    whole = source().neuron_rows(1, 0, 1024)
    assert whole.shape == (1024, 2, 256)
    for start, stop in [(0, 1), (255, 257), (300, 900), (1023, 1024)]:
        np.testing.assert_array_equal(source().neuron_rows(1, start, stop).view(np.uint16), whole[start:stop].view(np.uint16))
    assert (source().neuron_rows(2, 0, 8).view(np.uint16) != whole[:8].view(np.uint16)).mean() > 0.9


def test_seeds_matter() -> None:
    other = source(Planting(rank=16, seed=1)).neuron_rows(0, 0, 64)
    assert (other.view(np.uint16) != source().neuron_rows(0, 0, 64).view(np.uint16)).mean() > 0.9


def test_the_planted_rank_is_the_rank() -> None:
    up = source().neuron_rows(0, 0, 1024)[:, 0].astype(np.float32)
    values = np.linalg.svd(up, compute_uv=False) ** 2
    assert values[:16].sum() / values.sum() > 0.95  # the noise is 2.25 % of it
    assert values[15] > 5 * values[16]


def test_a_hugging_face_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    with source(num_layers=2) as made:
        write_huggingface(made, tmp_path / "checkpoint")
        expected = convert(made, tmp_path / "expected", predictor_rank=0)
        with pytest.raises(InflashError, match="already exists"):
            write_huggingface(made, tmp_path / "checkpoint")
    found = convert_quietly(tmp_path / "checkpoint", tmp_path / "found", predictor_rank=0)
    assert found.config == expected.config and found.dtype == "bfloat16"
    assert find_faults(found, most=5) == []
    for layer in range(2):
        for name in ("checksums", "bundles"):
            path = f"ffn/{layer}/{name}/c/0" + "/0/0" * (name == "bundles")
            assert (found.path / path).read_bytes() == (expected.path / path).read_bytes()
    for layer in resident_layers(found.config):
        pieces = zip(found.load_resident(layer), expected.load_resident(layer), strict=True)
        for (piece, rows), (_, wanted) in pieces:
            np.testing.assert_array_equal(rows.view(np.uint8), wanted.view(np.uint8), err_msg=f"{layer} {piece.spec.name}")


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_are_what_their_config_says(name: str) -> None:
    config = named_config(name)
    assert model_config(config_document(config, "bfloat16")) == config
    assert config.d_ff == 4 * config.d_model and config.d_model % config.num_heads == 0
    assert {spec.name for spec in resident_specs(config, 0, "bfloat16")} >= {"qkv", "up_bias"}


@pytest.mark.parametrize(
    ("planting", "sizes", "message"),
    [
        ({"active": 0.0}, {}, "--active: expected a share from 0.001 to 0.5, found 0.0"),
        ({"rank": 300}, {}, "--rank: expected 1 to d_model = 256, found 300"),
        ({"persistence": 0.01}, {}, r"--persistence: expected 0\.\d\d to 0\.\d\d"),
        ({}, {"norm_first": False, "final_norm": False}, "expected a pre-LN model"),
    ],
)
def test_what_cannot_be_planted_is_refused(planting: dict, sizes: dict, message: str) -> None:
    with pytest.raises(InflashError, match=message):
        source(Planting(**{"rank": 16, **planting}), **sizes)
