"""The small files that come with a model: its tokenizer and its defaults for generation."""

import json
from typing import TYPE_CHECKING, Any

from ..errors import InflashError
from ..storage.store import Store

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def generation_config(store: Store) -> dict[str, Any]:
    """The content of `generation_config.json`; empty when the model brought none.

    Raises:
      InflashError: the file is no JSON object.
    """
    path = store.tokenizer_folder / "generation_config.json"
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InflashError(f"{path}: expected JSON: {error}") from error
    if not isinstance(document, dict):
        raise InflashError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def load_tokenizer(store: Store) -> "Tokenizer | None":
    """The model's tokenizer; None when it brought none, and takes token ids only.

    Raises:
      InflashError: the file cannot be read.
    """
    path = store.tokenizer_folder / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InflashError(f"{path}: this tokenizer cannot be read: {error}") from error
