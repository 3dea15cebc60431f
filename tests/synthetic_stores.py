"""Small stores with planted sparsity, whose predictors are right about nearly everything."""

from pathlib import Path
from typing import Any

from tiny_models import convert_quietly_from

from inflash.storage.model_config import ModelConfig
from inflash.storage.store import Store
from inflash.storage.synthetic import Planting, SyntheticSource
from inflash.tools.synth import planted_predictors


def synthetic_config(**sizes: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "family": "opt", "vocab_size": 512, "d_model": 256, "d_ff": 1024, "num_layers": 3, "num_heads": 4, "max_positions": 512,
            "embed_dim": 256, "position_offset": 2, **sizes,
        }
    )  # fmt: skip


def synthetic_store(path: Path, planting: Planting | None = None, **sizes: Any) -> Store:
    """A bfloat16 store at `path` with the predictors "planted" and "planted-ahead"."""
    with SyntheticSource(synthetic_config(**sizes), "a small model", planting or Planting(rank=32)) as source:
        return convert_quietly_from(source, path, predictor_rank=0, predictors=planted_predictors(source))
