"""Words for models that have none: every token beyond the bytes is a pronounceable word of its own."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ..storage.families.opt import config_document
from ..storage.model_config import ModelConfig

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # OPT's first four tokens
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def write_tokenizer(folder: Path, config: ModelConfig, dtype: str) -> None:
    """Writes tokenizer.json and config.json."""
    vocabulary = {token: number for number, token in enumerate(_tokens(config.vocab_size))}
    model = models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)  # a word of the vocabulary is one token; others are bytes
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config_document(config, dtype), indent=2), encoding="utf-8")


def sample_text(vocab_size: int, num_words: int, seed: int) -> str:
    """Random words, a token each, in lines of twenty."""
    first = len(_SPECIAL) + len(pre_tokenizers.ByteLevel.alphabet())
    numbers = np.random.default_rng(seed).integers(0, max(vocab_size - first, 1), num_words).tolist()
    lines = [" ".join(_word(number) for number in numbers[start : start + 20]) for start in range(0, num_words, 20)]
    return "".join(f" {line}\n" for line in lines)


def _tokens(vocab_size: int) -> list[str]:
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = (f"\u0120{_word(number)}" for number in range(vocab_size))  # \u0120 is how the byte alphabet writes a space
    while len(tokens) < vocab_size:
        tokens.append(next(words))
    return tokens[:vocab_size]


def _word(number: int) -> str:
    """Two syllables, or more where numbers are large; different for different numbers."""
    syllables = []
    while number or len(syllables) < 2:
        number, digit = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[digit])
    return "".join(reversed(syllables))
