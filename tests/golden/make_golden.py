"""Makes the golden logits beside it with transformers and PyTorch, which neither inflash nor its tests need.

In an environment of its own:

    pip install torch==2.13.0 transformers safetensors ml_dtypes
    python tests/golden/make_golden.py

Each file `opt_{variant}.npz` holds, for a checkpoint that tests write again from its seed, `token_ids_{i}` [T] int32 and `logits_{i}`
[T, V] float32 of a few prompts, the checkpoint's checksum, and the versions that made it. Galactica itself has GELU; the variant
here has its missing biases and norms with ReLU.
"""

import argparse
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from opt_checkpoints import VARIANTS, checksum, write_opt_checkpoint

SEED = 20231212
PROMPT_LENGTHS = (1, 3, 7, 12, 20)


def prompts(variant: str, vocab_size: int) -> list[np.ndarray]:
    """Random token ids after `</s>`, which starts every text of OPT; the padding token is left out."""
    rng = np.random.default_rng([SEED, zlib.crc32(variant.encode())])
    return [np.concatenate([[2], rng.integers(3, vocab_size, length - 1)]).astype(np.int32) for length in PROMPT_LENGTHS]


def golden(variant: str, folder: Path) -> dict[str, np.ndarray]:
    tensors = write_opt_checkpoint(folder, variant=variant, seed=SEED)
    model, report = transformers.OPTForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), f"{variant}: transformers did not take every tensor: {report}"
    model.eval()
    arrays = {
        "seed": np.asarray(SEED),
        "weights_crc32": np.asarray(checksum(tensors)),
        "transformers_version": np.asarray(transformers.__version__),
        "torch_version": np.asarray(torch.__version__),
    }
    for number, token_ids in enumerate(prompts(variant, model.config.vocab_size)):
        with torch.no_grad():
            ids = torch.from_numpy(token_ids.astype(np.int64))[None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        arrays[f"token_ids_{number}"] = token_ids
        arrays[f"logits_{number}"] = logits.numpy().astype(np.float32)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).resolve().parent)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            arrays = golden(variant, Path(folder))
        path = output / f"opt_{variant}.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        logits = arrays[f"logits_{len(PROMPT_LENGTHS) - 1}"]
        print(f"{path.name}: {path.stat().st_size:,} bytes, standard deviation of the last prompt's logits {logits.std():.2f}")


if __name__ == "__main__":
    main()
