"""The golden logits, and the checkpoints they belong to."""

from pathlib import Path

import numpy as np
from opt_checkpoints import checksum, write_opt_checkpoint

_FOLDER = Path(__file__).parent / "golden"


def write_golden_checkpoint(folder: Path, variant: str) -> None:
    """Writes the float32 checkpoint that a variant's golden logits were made with."""
    with np.load(_FOLDER / f"opt_{variant}.npz") as golden:
        tensors = write_opt_checkpoint(folder, variant=variant, seed=int(golden["seed"]))
        assert checksum(tensors) == int(golden["weights_crc32"]), "other weights than the golden ones; run golden/make_golden.py"


def golden_prompts(variant: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids [T] int32 and transformers' float32 logits [T, V] of each prompt."""
    with np.load(_FOLDER / f"opt_{variant}.npz") as golden:
        count = sum(name.startswith("token_ids_") for name in golden.files)
        return [(golden[f"token_ids_{number}"], golden[f"logits_{number}"]) for number in range(count)]
