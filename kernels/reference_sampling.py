"""What `sampling` computes, said plainly: NumPy, float64, one row at a time, with sorts.

Axes: B batch rows, V vocabulary, K most likely tokens.
"""

import numpy as np


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) of one row, [V] f64."""
    logits = logits.astype(np.float64)
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def kept_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens of one row [V] min-p, then top-k, then top-p leave: [V] bool."""
    likely = probabilities(logits, temperature)
    kept = likely >= min_p * likely.max()
    if 0 < top_k < len(logits):
        kept &= logits >= np.sort(logits)[::-1][top_k - 1]
    if top_p < 1:
        likely = np.where(kept, likely, 0) / likely[kept].sum()
        for token, value in enumerate(logits):
            kept[token] &= likely[logits > value].sum() < top_p
    return kept


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The probabilities [V] f64 with which a row's tokens should be drawn."""
    kept = kept_tokens(logits, temperature, top_k, top_p, min_p)
    likely = np.where(kept, probabilities(logits, temperature), 0)
    return likely / likely.sum()


def penalize(
    logits: np.ndarray,
    prompt_counts: np.ndarray,
    output_counts: np.ndarray,
    repetition: np.ndarray,
    presence: np.ndarray,
    frequency: np.ndarray,
) -> np.ndarray:
    """Repetition, frequency and presence penalties of all rows: [B, V] f64."""
    result = logits.astype(np.float64)
    for row, token in np.ndindex(*logits.shape):
        if prompt_counts[row, token] or output_counts[row, token]:
            factor = 1 / repetition[row] if result[row, token] > 0 else repetition[row]
            result[row, token] *= factor
        if output_counts[row, token]:
            result[row, token] -= presence[row] + frequency[row] * output_counts[row, token]
    return result


def top_logprobs(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [B, K] f64 and ids [B, K] of each row's k most likely tokens, the lowest id first among equals."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    values = np.log([probabilities(row) for row in logits])
    return np.take_along_axis(values, ids, axis=-1), ids


def token_logprobs(logits: np.ndarray, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability [B] f64 and rank [B], from 1, of one token of each row."""
    values = [np.log(probabilities(row)[token]) for row, token in zip(logits, token_ids, strict=True)]
    ranks = [1 + int(np.sum(row > row[token])) for row, token in zip(logits, token_ids, strict=True)]
    return np.array(values), np.array(ranks)
