"""Drives an engine with known texts: part of each as its prompt, the rest a token at a time. Axes: B sequences, V vocabulary."""

from collections.abc import Sequence

import numpy as np

from inflash.pipeline.engine import Engine


def teacher_forced(engine: Engine, texts: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
    """Each text's logits from the end of its prompt on: [T - prompt + 1, V]. The engine is prepared for as many sequences.

    Texts of different lengths end at different steps; the rows of those that ended are padding.
    """
    prompts = [text[:length] for text, length in zip(texts, prompt_lengths, strict=True)]
    first = np.asarray(engine.process_prompts(list(enumerate(prompts))))
    found = [[first[row]] for row in range(len(texts))]
    positions = np.asarray(prompt_lengths)
    while (active := positions < [len(text) for text in texts]).any():
        tokens = [text[at] if live else 0 for text, at, live in zip(texts, positions, active, strict=True)]
        logits = np.asarray(engine.decode(np.asarray(tokens, np.int32), np.where(active, positions, 0).astype(np.int32), active))
        for row in np.flatnonzero(active):
            found[row].append(logits[row])
        positions = positions + active
    return [np.stack(rows) for rows in found]
