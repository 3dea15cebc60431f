"""Tokens to calibrate a plan with, and to measure it on."""

from pathlib import Path

import numpy as np

from ..storage.store import Store

_SEED = 0


def tokens_for(store: Store, text: Path | None, windows: int, context: int) -> tuple[np.ndarray, str]:
    """[W, C] int32 and where they are from: a text, the store's own sample, or nowhere.

    Raises:
      InflashError: the text cannot be read or is too short, or the store has no tokenizer for it.
    """
    from ..pipeline.text_windows import read_windows
    from .train_predictor import tokenizer_of

    sample = store.path / "sample.txt"
    file = text or (sample if sample.exists() else None)
    if file is None:
        token_ids = np.random.default_rng(_SEED).integers(0, store.config.vocab_size, (windows, context), np.int32)
        return token_ids, "random tokens"
    found = read_windows(
        [file],
        tokenizer_of(store),
        bos_id=store.config.bos_token_id,
        context=context,
        most_tokens=windows * (context - 1),
        least_windows=windows,
    )
    return found.token_ids[:windows], str(file)
