"""Runs a model in a memory cgroup that is too small for it.

    python tests/integration/memory_limit.py --like opt-1.3b

as root: writes a checkpoint of random bfloat16 weights in the shape of an OPT model, converts it, and runs a batch file against it in a
cgroup of 75 % of the model's size. Then the same with `--ffn resident`, which has to be refused before it starts. With `--job train`,
trains a predictor in a cgroup of half the model's size instead. The biases of fc1 are shifted so that about 5 % of the neurons are
active, as in trained OPT models.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from opt_checkpoints import opt_config
from tiny_models import byte_tokenizer

from inflash.tools.memory_group import NoCgroup, memory_group

SHAPES: dict[str, dict[str, int]] = {
    "opt-125m": {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
    "opt-2.7b": {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32},
}
ACTIVE_SHIFT = -1.64  # what a normal distribution exceeds 5 % of the time, from above
NUM_PROMPTS = 4
TRAINING_TOKENS = 16 * 255  # whole windows


def write_checkpoint(folder: Path, shape: dict[str, int]) -> int:
    """A Hugging Face checkpoint, a shard a layer; returns the bytes of its weights."""
    folder.mkdir()
    config = opt_config("plain", "bfloat16", vocab_size=50272, max_position_embeddings=2048, **shape)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng()
    weight_map: dict[str, str] = {}
    total = 0
    layers = range(config["num_hidden_layers"])
    for file, shapes in (("embeddings", embedding_shapes(config)), *((f"layer_{n}", layer_shapes(config, n)) for n in layers)):
        tensors = {f"model.decoder.{name}": random_tensor(rng, name, size) for name, size in shapes.items()}
        save_file(tensors, folder / f"{file}.safetensors")
        weight_map.update(dict.fromkeys(tensors, f"{file}.safetensors"))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def embedding_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width = config["hidden_size"]
    shapes = {"embed_tokens.weight": (config["vocab_size"], width)}
    shapes |= {"embed_positions.weight": (config["max_position_embeddings"] + 2, width)}
    return {**shapes, "final_layer_norm.weight": (width,), "final_layer_norm.bias": (width,)}


def layer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    width, ffn = config["hidden_size"], config["ffn_dim"]
    linear = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    linear |= {"fc1": (ffn, width), "fc2": (width, ffn)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {f"layers.{layer}.{name}": size for name, size in shapes.items()}


def random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that keep activations near 1."""
    values = rng.standard_normal(shape, np.float32)
    if len(shape) == 2:
        values *= np.float32(0.3 if name.startswith("embed_") else shape[1] ** -0.5)
    else:
        values *= np.float32(0.1)
        values += np.float32(1 if "norm.weight" in name else ACTIVE_SHIFT if "fc1" in name else 0)
    return values.astype(ml_dtypes.bfloat16)


def write_batch(file: Path, num_tokens: int) -> None:
    rng = np.random.default_rng()
    lines = []
    for number in range(NUM_PROMPTS):
        body = {
            "prompt": rng.integers(4, 50000, 8 + number).tolist(),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        lines.append(json.dumps({"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": body}))
    file.write_text("\n".join(lines) + "\n")


def inflash(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "inflash.tools.cli", *map(str, words)]


def check(shape: dict[str, int], folder: Path, *, share: float, num_tokens: int, flags: Sequence[str]) -> dict[str, Any]:
    """Converts and runs; returns the figures. An AssertionError says what went otherwise than it should."""
    model_bytes = write_checkpoint(folder / "checkpoint", shape)
    began = time.monotonic()
    subprocess.run(inflash("convert", folder / "checkpoint", folder / "store"), check=True, capture_output=True)
    convert_s = time.monotonic() - began
    shutil.rmtree(folder / "checkpoint")
    write_batch(folder / "in.jsonl", num_tokens)
    limit = int(share * model_bytes)
    batch = ("run-batch", "-i", folder / "in.jsonl", "--model", folder / "store", "--json", *flags)
    with memory_group(limit) as group:
        began = time.monotonic()
        done = group.run(inflash(*batch, "-o", folder / "out.jsonl"), capture_output=True)
        run_s = time.monotonic() - began
        assert done.returncode == 0, f"run-batch ended with {done.returncode} at {limit >> 20} MiB: {done.stderr[-2000:]}"
        peak = group.peak_bytes()
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len(answers) == NUM_PROMPTS
    for answer in answers:
        assert answer["response"]["status_code"] == 200, answer
        assert answer["response"]["body"]["usage"]["completion_tokens"] == num_tokens
    with memory_group(limit) as group:
        refused = group.run(inflash(*batch, "-o", folder / "never.jsonl", "--ffn", "resident"), capture_output=True)
    assert refused.returncode == 2, f"--ffn resident ended with {refused.returncode}: {refused.stderr[-2000:]}"
    assert "memory: this run needs" in refused.stderr and "MiB available" in refused.stderr
    assert not (folder / "never.jsonl").exists()
    return {
        "model_mib": model_bytes >> 20,
        "limit_mib": limit >> 20,
        "peak_mib": None if peak is None else peak >> 20,
        "convert_s": round(convert_s, 1),
        "run_s": round(run_s, 1),
        "refused": refused.stderr.strip(),
        "run": json.loads(done.stdout.splitlines()[-1])["run"],
    }


def check_training(shape: dict[str, int], folder: Path, *, share: float, num_tokens: int) -> dict[str, Any]:
    """Converts, and trains a predictor from a text in which a token is a byte; returns the figures."""
    model_bytes = write_checkpoint(folder / "checkpoint", shape)
    byte_tokenizer().save(str(folder / "checkpoint" / "tokenizer.json"))
    subprocess.run(inflash("convert", folder / "checkpoint", folder / "store"), check=True, capture_output=True)
    shutil.rmtree(folder / "checkpoint")
    (folder / "text.txt").write_bytes(np.random.default_rng().integers(32, 127, num_tokens + 100, np.uint8).tobytes())
    job = ("train-predictor", folder / "store", "--text", folder / "text.txt", "--tokens", str(num_tokens), "--context", "256")
    limit = int(share * model_bytes)
    with memory_group(limit) as group:
        began = time.monotonic()
        done = group.run(inflash(*job, "--rank", "64", "--recall", "0.95", "--json"), capture_output=True)
        train_s = time.monotonic() - began
        assert done.returncode == 0, f"train-predictor ended with {done.returncode} at {limit >> 20} MiB: {done.stderr[-2000:]}"
        peak = group.peak_bytes()
    made = json.loads(done.stdout.splitlines()[-1])["predictors"]["trained"]
    assert len(made["ranks"]) == shape["num_hidden_layers"]
    return {
        "model_mib": model_bytes >> 20,
        "limit_mib": limit >> 20,
        "peak_mib": None if peak is None else peak >> 20,
        "train_s": round(train_s, 1),
        "predictor": made,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=SHAPES, default="opt-1.3b")
    parser.add_argument("--job", choices=("generate", "train"), default="generate", help="what to run (%(default)s)")
    parser.add_argument("--share", type=float, help="the limit as a share of the model's bytes (0.75; train: 0.5)")
    parser.add_argument("--tokens", type=int, help="to generate for each of the prompts (16), or to train on (4080)")
    parser.add_argument("--folder", type=Path, help="where to work; needs twice the model's size (default: a temporary folder)")
    parser.add_argument("flags", nargs="*", help="for run-batch, after --", default=DEFAULT_FLAGS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        try:
            shape = SHAPES[arguments.like]
            if arguments.job == "train":
                figures = check_training(
                    shape, Path(folder), share=arguments.share or 0.5, num_tokens=arguments.tokens or TRAINING_TOKENS
                )
            else:
                share, tokens = arguments.share or 0.75, arguments.tokens or 16
                figures = check(shape, Path(folder), share=share, num_tokens=tokens, flags=arguments.flags)
        except NoCgroup as error:
            sys.exit(f"skipped: {error}")
    print(json.dumps(figures, indent=2))


DEFAULT_FLAGS = ("--cache-neurons", "0.1", "--max-num-seqs", "2", "--max-model-len", "64")

if __name__ == "__main__":
    main()
