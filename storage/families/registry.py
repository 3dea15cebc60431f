"""The families that inflash converts, by the `model_type` of their config.json."""

from collections.abc import Callable, Collection
from typing import Any

from ...errors import InflashError
from .opt import OptTranslation
from .translation import Translation

FAMILIES: dict[str, Callable[[dict[str, Any], Collection[str]], Translation]] = {"opt": OptTranslation}


def translate(document: dict[str, Any], tensor_names: Collection[str]) -> Translation:
    """The translation of a checkpoint.

    Args:
      document: its config.json.
      tensor_names: the names of all its tensors.

    Raises:
      InflashError: a model_type, an activation or another setting that inflash does not support.
    """
    model_type = document.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InflashError(f"model_type should be one of {', '.join(FAMILIES)}, found {model_type!r}")
    if document.get("quantization_config") is not None:
        raise InflashError("quantization_config should be absent, found a quantised model; convert the original checkpoint")
    return FAMILIES[model_type](document, tensor_names)
