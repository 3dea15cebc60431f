"""OPT (125m to 66b, the post-LN 350m, and Galactica's variant without biases and learned norms).

Axes: D d_model, F d_ff, E embed_dim, V vocabulary.

`fc1` [F, D] and `fc2` [D, F] are a layer's neurons, with ReLU between. Position p uses row p + 2 of the position table.
"""

from collections.abc import Collection
from typing import Any

from ...errors import InflashError
from ..model_config import ModelConfig
from .translation import NeuronPart, Recipe

_PREFIXES = ("model.decoder.", "decoder.")
_HEAD = "lm_head.weight"
_POSITION_OFFSET = 2  # from fairseq, whose table begins with rows for padding
_NORM_EPSILON = 1e-5  # PyTorch's default, which OPT's config cannot change

_EMBEDDINGS = {"tokens": "embed_tokens", "positions": "embed_positions", "project_in": "project_in", "project_out": "project_out"}
_LAYER_MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.out_proj",),
}
_LAYER_BIASES = {
    "qkv_bias": _LAYER_MATRICES["qkv"],
    "attention_out_bias": _LAYER_MATRICES["attention_out"],
    "up_bias": ("fc1",),
    "down_bias": ("fc2",),
}
_LAYER_NORMS = {"attention_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm"}

# d_model, layers, heads; d_ff is four times d_model. From the models' config.json files.
_SIZES = {
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-2.7b": (2560, 32, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
    "opt-66b": (9216, 64, 72),
}
SIZES = tuple(_SIZES)
"""Names of `named_config`."""


class OptTranslation:
    """A translation of an OPT checkpoint; see `Translation`.

    Attributes:
      config: the canonical config.

    Raises:
      InflashError: a setting that is missing, malformed or not supported.
    """

    def __init__(self, document: dict[str, Any], tensor_names: Collection[str]) -> None:
        self.config = model_config(document)
        self._has_biases = _flag(document, "enable_bias", True)
        self._has_norm_weights = _flag(document, "layer_norm_elementwise_affine", True)
        self._prefix = _prefix(tensor_names)

    def resident(self, name: str, layer: int | None) -> Recipe:
        if name == "head":
            return Recipe(names=(_HEAD,))
        if layer is None:
            if name in _EMBEDDINGS:
                return Recipe(names=(f"{self._prefix}{_EMBEDDINGS[name]}.weight",))
            return self._norm(f"{self._prefix}final_layer_norm", name)
        block = f"{self._prefix}layers.{layer}."
        if name in _LAYER_MATRICES:
            return Recipe(names=tuple(f"{block}{module}.weight" for module in _LAYER_MATRICES[name]))
        if name in _LAYER_BIASES:
            return Recipe(names=tuple(f"{block}{module}.bias" for module in _LAYER_BIASES[name] if self._has_biases))
        return self._norm(block + _LAYER_NORMS[name.rpartition("_")[0]], name)

    def neuron_parts(self, layer: int) -> tuple[NeuronPart, ...]:
        block = f"{self._prefix}layers.{layer}."
        return NeuronPart(name=f"{block}fc1.weight", neuron_axis=0), NeuronPart(name=f"{block}fc2.weight", neuron_axis=1)

    def owns(self, name: str) -> bool:
        return name.startswith(self._prefix) and name.endswith((".weight", ".bias"))

    def _norm(self, module: str, name: str) -> Recipe:
        """A LayerNorm's `..._scale` or `..._bias`; without learned ones, those that change nothing."""
        is_scale = name.endswith("_scale")
        if not self._has_norm_weights:
            return Recipe(constant=1.0 if is_scale else 0.0)
        return Recipe(names=(f"{module}.{'weight' if is_scale else 'bias'}",))


def model_config(document: dict[str, Any]) -> ModelConfig:
    """The canonical config of OPT's config.json.

    Raises:
      InflashError: a setting is missing, malformed or not supported.
    """
    activation = document.get("activation_function", "relu")
    if activation != "relu":
        raise InflashError(
            f"activation_function should be 'relu', found {activation!r}; inflash skips the neurons that ReLU makes exactly zero"
        )
    norm_first = _flag(document, "do_layer_norm_before", True)
    d_model = _size(document, "hidden_size")
    return ModelConfig(
        family="opt",
        vocab_size=_size(document, "vocab_size"),
        d_model=d_model,
        d_ff=_size(document, "ffn_dim"),
        num_layers=_size(document, "num_hidden_layers"),
        num_heads=_size(document, "num_attention_heads"),
        max_positions=_size(document, "max_position_embeddings"),
        embed_dim=d_model if document.get("word_embed_proj_dim") is None else _size(document, "word_embed_proj_dim"),
        norm_first=norm_first,
        final_norm=norm_first and not _flag(document, "_remove_final_layer_norm", False),
        tied_head=_flag(document, "tie_word_embeddings", True),
        norm_epsilon=_NORM_EPSILON,
        position_offset=_POSITION_OFFSET,
        bos_token_id=_token_id(document, "bos_token_id", 2),
        eos_token_id=_token_id(document, "eos_token_id", 2),
        pad_token_id=_token_id(document, "pad_token_id", 1),
    )


def _prefix(tensor_names: Collection[str]) -> str:
    """The prefix of the decoder's tensors; the usual one where there are none, whose absence is told later."""
    return next((prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in tensor_names), _PREFIXES[0])


def _size(document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InflashError(f"{key} should be a positive integer, found {value!r}")
    return value


def _flag(document: dict[str, Any], key: str, default: bool) -> bool:
    value = document.get(key, default)
    if not isinstance(value, bool):
        raise InflashError(f"{key} should be true or false, found {value!r}")
    return value


def _token_id(document: dict[str, Any], key: str, default: int) -> int:
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InflashError(f"{key} should be one token id, found {value!r}")
    return value


def named_config(name: str) -> ModelConfig:
    """The canonical config of one of the models in `SIZES`, all of them pre-LN."""
    d_model, num_layers, num_heads = _SIZES[name]
    return ModelConfig(
        family="opt",
        vocab_size=50272,
        d_model=d_model,
        d_ff=4 * d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        max_positions=2048,
        embed_dim=d_model,
        position_offset=_POSITION_OFFSET,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )


def config_document(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a canonical config, for transformers: what `model_config` reads back."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "word_embed_proj_dim": config.embed_dim,
        "ffn_dim": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "activation_function": "relu",
        "do_layer_norm_before": config.norm_first,
        "_remove_final_layer_norm": config.norm_first and not config.final_norm,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
    }


def tensor_names(name: str, layer: int | None) -> tuple[str, ...]:
    """The Hugging Face names that make the canonical tensor `name`, stacked along its first axis; for "neurons" fc1 and fc2."""
    prefix = _PREFIXES[0]
    if name == "head":
        return (_HEAD,)
    norm, _, part = name.rpartition("_")
    ending = {"scale": ".weight", "bias": ".bias"}.get(part, ".weight")
    if layer is None:
        return (f"{prefix}{_EMBEDDINGS[name]}.weight",) if name in _EMBEDDINGS else (f"{prefix}final_layer_norm{ending}",)
    block = f"{prefix}layers.{layer}."
    if name == "neurons":
        return f"{block}fc1.weight", f"{block}fc2.weight"
    if name in _LAYER_MATRICES or name in _LAYER_BIASES:
        modules = _LAYER_MATRICES.get(name) or _LAYER_BIASES[name]
        return tuple(f"{block}{module}{ending}" for module in modules)
    return (f"{block}{_LAYER_NORMS[norm]}{ending}",)
