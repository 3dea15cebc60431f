"""Takes a checkpoint's tokenizer and config files along into a store."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from ..errors import InflashError
from .json_files import read_json_object

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def copy_tokenizer(source: Path, destination: Path) -> bool:
    """Copies tokenizer and config files, and builds `tokenizer.json` from `vocab.json` and `merges.txt` where it is missing.

    Args:
      source: the checkpoint's directory.
      destination: made when it does not exist.

    Returns:
      Whether there is a tokenizer. A model without one still takes token ids.

    Raises:
      InflashError: a file is malformed, or only one of `vocab.json` and `merges.txt` is there.
    """
    configs = {name: read_json_object(source / name) for name in _CONFIG_FILES if (source / name).exists()}
    tokenizer = _load_tokenizer(source, configs)
    destination.mkdir(parents=True, exist_ok=True)
    for name in configs:
        shutil.copyfile(source / name, destination / name)
    if (source / CHAT_TEMPLATE_FILE).exists():
        shutil.copyfile(source / CHAT_TEMPLATE_FILE, destination / CHAT_TEMPLATE_FILE)
    if tokenizer is None:
        return False
    if (source / TOKENIZER_FILE).exists():
        shutil.copyfile(source / TOKENIZER_FILE, destination / TOKENIZER_FILE)
    else:
        tokenizer.save(str(destination / TOKENIZER_FILE))
    return True


def _load_tokenizer(source: Path, configs: dict[str, dict[str, Any]]) -> Tokenizer | None:
    path, vocabulary, merges = source / TOKENIZER_FILE, source / "vocab.json", source / "merges.txt"
    if path.exists():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise InflashError(f"{path}: not a tokenizer that the tokenizers library reads ({error})") from error
    if not vocabulary.exists() and not merges.exists():
        return None
    for file in (vocabulary, merges):
        if not file.exists():
            raise InflashError(f"{source}: a tokenizer needs vocab.json and merges.txt, found no {file.name}")
    return _build_tokenizer(source, configs)


def _build_tokenizer(source: Path, configs: dict[str, dict[str, Any]]) -> Tokenizer:
    """GPT-2's byte-level BPE from its two files, as OPT uses it: `</s>` before every text."""
    vocabulary, merges = source / "vocab.json", source / "merges.txt"
    ids = read_json_object(vocabulary)
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises nothing more specific
        raise InflashError(f"{source}: vocab.json and merges.txt make no tokenizer ({error})") from error
    settings = configs.get("tokenizer_config.json", {})
    prefix_space = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = _special_tokens(source, configs, ids)
    tokenizer.add_special_tokens(sorted({token for token in special.values() if token in ids}, key=lambda token: ids[token]))
    if settings.get("add_bos_token", configs.get("config.json", {}).get("model_type") == "opt"):
        bos = special.get("bos_token")
        if bos is None or bos not in ids:
            raise InflashError(f"{source}: bos_token should be one of the {len(ids)} tokens of {vocabulary.name}, found {bos!r}")
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
        )
    return tokenizer


def _special_tokens(source: Path, configs: dict[str, dict[str, Any]], ids: dict[str, int]) -> dict[str, str]:
    """The special tokens by their role: as the tokenizer's files say, else those of the ids in config.json."""
    tokens = {number: token for token, number in ids.items()}
    found: dict[str, str] = {}
    for role in _SPECIAL_TOKENS:
        token_id = configs.get("config.json", {}).get(f"{role}_id")
        if isinstance(token_id, int) and token_id in tokens:
            found[role] = tokens[token_id]
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            value = configs.get(file, {}).get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if text is None:
                continue
            if not isinstance(text, str):
                raise InflashError(f"{source / file}: {role} should be a token, found {json.dumps(value)}")
            found[role] = text
    return found
