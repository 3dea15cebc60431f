"""Saves the embedded model as an ordinary Hugging Face checkpoint, with its card."""

import json
import math
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from .demo_corpus import BOS, EOS, PAD, UNKNOWN
from .demo_network import DemoConfig, Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the model card tells; losses in nats a token, `zeros` the share of inactive neurons by layer."""

    steps: int
    trained_tokens: int
    stream_tokens: int
    seed: int
    validation_loss: float
    validation_tokens: int
    zeros: list[float]


def export(folder: Path, parameters: Parameters, config: DemoConfig, tokenizer: Path, facts: ModelFacts) -> None:
    """Writes config, weights in bfloat16, tokenizer and card."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in parameters.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    _write_json(folder / "config.json", _config(config))
    _write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": UNKNOWN,
            "model_max_length": config.max_positions,
            "clean_up_tokenization_spaces": False,
        },
    )
    num_parameters = sum(value.size for value in weights.values())
    (folder / "README.md").write_text(_card(config, facts, num_parameters), encoding="utf-8")


def _config(config: DemoConfig) -> dict[str, object]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "word_embed_proj_dim": config.d_model,
        "ffn_dim": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "dtype": "bfloat16",
    }


def _card(config: DemoConfig, facts: ModelFacts, num_parameters: int) -> str:
    layers = "\n".join(f"| {layer} | {100 * share:.1f} % |" for layer, share in enumerate(facts.zeros))
    return f"""# The embedded model

A language model of {num_parameters / 1e6:.1f} million parameters in OPT's architecture, small enough to ship with inflash and real
enough to show it at work: it continues Python code, plausibly and without understanding.

| | |
|---|---|
| architecture | OPT: {config.num_layers} layers, d_model {config.d_model}, {config.d_ff} ReLU neurons a layer, {config.num_heads} heads, \
{config.max_positions} positions, {config.vocab_size} tokens |
| data | source of the standard library of Python {platform.python_version()}, without its tests: {facts.stream_tokens:,} tokens |
| tokenizer | byte-level BPE trained on the same files |
| training | {facts.steps} steps, {facts.trained_tokens:,} tokens seen, AdamW, from scratch (seed {facts.seed}) |
| validation | the standard library's test modules, never trained on: {facts.validation_tokens:,} tokens in rows of \
{config.max_positions}, each row from a random place and started with `</s>` |
| loss, perplexity | {facts.validation_loss:.3f} nats a token, {math.exp(facts.validation_loss):.1f} |
| weights | bfloat16, safetensors |

Neurons that are exactly zero after the ReLU, on the validation text:

| layer | zeros |
|---|---|
{layers}

Sparsity was trained in: one term of the loss counts the neurons that carry each token. `python -m inflash.tools.train_demo` makes the
model again; its docstring says how.

**Predictor.** `trained.safetensors` is its predictor of active neurons, rank 40 in every layer, 5 % of the model's weights, as
`inflash export-predictor` writes it. It was trained on half of the test modules; `python -m inflash.tools.train_demo_predictor` makes it
again.

**Licence.** The weights were made by this project and come under its licence, Apache-2.0. They were trained on Python's standard
library, which is under the Python Software Foundation License Version 2; no file of it is included. Text from the model may resemble it.

Special tokens: `{BOS}` 0, `{PAD}` 1, `{EOS}` 2 (before every text), `{UNKNOWN}` 3.
"""


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
