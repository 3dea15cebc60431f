"""What predictors cost: dense and sparse runs of the same model over the same text, side by side.

Axes: W windows of a group, C tokens of a window, D d_model, F d_ff, V vocabulary.

All text goes through a layer before the next one is read, once without a predictor and once with each, so that models of any size can be
judged. How well a predictor guesses is counted on the dense run: its inputs and its active neurons are the model's own. What that costs
in quality is seen in the predictor's own run, in which every layer reads what sparse layers before it have made.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InflashError
from ..kernels.compilation import jit
from ..storage.predictor_layout import predictor_bytes
from ..storage.scratch import WindowArray
from ..storage.store import Store
from .layerwise import LayerOutput, LayerwisePass
from .predictors import LayerPredictor, load_layer
from .text_windows import TextWindows
from .weights import on_device

DENSE = "dense"
CURVE_RECALLS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""Where a recall curve has points: thresholds that would give about these recalls."""
_LOGIT_TOKENS = 256  # compared at once

Progress = Callable[[int], object]
"""Told how many more tokens went through a layer."""


@dataclass(slots=True)
class GuessCounts:
    """How one layer's predictor guessed, in pairs of a token and a neuron.

    Attributes:
      pairs, active, named, hits: all, truly active, named, and both.
      repeated, repeatable: named again by the next token of the window; named at all but a window's first tokens.
      thresholds, curve: of CURVE_RECALLS; [named, hits] for each.
      curve_pairs: those that the curve counts: windows before the first with an active neuron have no thresholds to be counted by.
    """

    pairs: int = 0
    active: int = 0
    named: int = 0
    hits: int = 0
    repeated: int = 0
    repeatable: int = 0
    curve_pairs: int = 0
    thresholds: np.ndarray | None = None
    curve: np.ndarray = field(default_factory=lambda: np.zeros((len(CURVE_RECALLS), 2), np.int64))

    def add(self, scores: np.ndarray, threshold: float, active: np.ndarray) -> None:
        """Counts one window: scores [C, F] f32, active [C, F] bool."""
        named = scores > threshold
        self.pairs += active.size
        self.active += int(active.sum())
        self.named += int(named.sum())
        self.hits += int((named & active).sum())
        self.repeated += int((named[1:] & named[:-1]).sum())
        self.repeatable += int(named[1:].sum())
        truly = scores[active]
        if self.thresholds is None and truly.size:
            self.thresholds = np.quantile(truly, [1 - recall for recall in CURVE_RECALLS])
        if self.thresholds is not None:
            self.curve_pairs += active.size
            self.curve += [((scores > at).sum(), (truly > at).sum()) for at in self.thresholds]

    def shares(self) -> dict[str, float]:
        """From 0 to 1; false negatives are counted among active neurons, false positives among the others, as the paper does."""
        recall = _share(self.hits, self.active, 1.0)
        return {
            "recall": recall,
            "precision": _share(self.hits, self.named, 1.0),
            "active": _share(self.active, self.pairs, 0.0),
            "predicted": _share(self.named, self.pairs, 0.0),
            "false_negatives": 1 - recall,
            "false_positives": _share(self.named - self.hits, self.pairs - self.active, 0.0),
            "overlap": _share(self.repeated, self.repeatable, 0.0),
        }

    def curve_points(self) -> list[dict[str, float]]:
        return [
            {"recall": _share(int(hits), self.active, 1.0), "predicted": _share(int(named), self.curve_pairs, 0.0)}
            for named, hits in self.curve
        ]


@dataclass(slots=True)
class TextFigures:
    """Sums over scored tokens: negative log-likelihood, KL(dense || sparse), equal top tokens; and the tokens."""

    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0


def evaluate(
    store: Store, windows: TextWindows, names: Sequence[str], *, progress: Progress = lambda tokens: None
) -> dict[str, Any]:
    """Runs the model over the text, dense and with each predictor.

    Args:
      store: the model.
      windows: the text.
      names: predictors of the store.
      progress: told `windows.num_tokens` in all for each layer (and the output head) of each run.

    Returns:
      The document that docs/cli.md describes.

    Raises:
      InflashError: the store has no such predictor.
    """
    names = check_names(store, names)
    _check_space(store, windows, names)
    with (
        tempfile.TemporaryDirectory(prefix="inflash-eval-") as scratch,
        LayerwisePass(store, windows.context) as model,
    ):
        comparison = _Comparison(model, windows, names, Path(scratch), progress)
        for layer in range(store.config.num_layers):
            comparison.pass_layer(layer)
        figures = comparison.compare_texts()
    return _document(store, windows, names, comparison, figures)


def check_names(store: Store, names: Sequence[str]) -> list[str]:
    """The names, each once.

    Raises:
      InflashError: the store has no such predictor.
    """
    for name in names:
        if name not in store.predictors:
            found = ", ".join(store.predictors) or "none"
            raise InflashError(f"{store.path}: expected one of its predictors ({found}), found {name!r}")
    return list(dict.fromkeys(names))


def _check_space(store: Store, windows: TextWindows, names: Sequence[str]) -> None:
    """Hidden states of every run wait on disk, and what look-ahead predictors read."""
    ahead = sum(store.predictors[name].ahead for name in names)
    arrays = 1 + len(names) + (ahead + 1 if ahead else 0)
    needed = arrays * windows.token_ids.size * 4 * store.config.d_model
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InflashError(
            f"{folder}: hidden states need {needed / 2**30:.2f} GiB, found {free / 2**30:.2f} GiB free; "
            "set TMPDIR to a folder on a larger disk, or use fewer --tokens or predictors"
        )


class _Comparison:
    """The dense run and each predictor's, in step."""

    def __init__(
        self, model: LayerwisePass, windows: TextWindows, names: Sequence[str], scratch: Path, progress: Progress
    ) -> None:
        self._model, self._windows, self._names, self._progress = model, windows, names, progress
        store = model.store
        shape = (*windows.token_ids.shape, store.config.d_model)
        self._ahead = {name for name in names if store.predictors[name].ahead}
        self._hidden = {run: WindowArray(scratch / f"hidden-{run}", shape, "float32", create=True) for run in (DENSE, *names)}
        # What a predictor that looks ahead reads: the FFN inputs of the layer before, in its own run and in the dense one.
        reading = (DENSE, *self._ahead) if self._ahead else ()
        self._before = {run: WindowArray(scratch / f"before-{run}", shape, "float32", create=True) for run in reading}
        self.counts = {name: [GuessCounts() for _ in range(store.config.num_layers)] for name in names}
        self.thresholds: dict[str, list[float]] = {name: [] for name in names}

    def pass_layer(self, layer: int) -> None:
        model, token_ids = self._model, self._windows.token_ids
        predictors = {name: load_layer(model.store, name, layer, verify=True) for name in self._names}
        for name, predictor in predictors.items():
            self.thresholds[name].append(predictor.threshold)
        with model.attention(layer) as weights:
            for first in range(0, len(token_ids), model.group):
                last = min(first + model.group, len(token_ids))
                embedded = None if layer else model.embed(token_ids[first:last])
                for run in (DENSE, *self._names):
                    hidden = self._hidden[run].read(first, last) if embedded is None else embedded
                    before = self._before[run].read(first, last) if layer and run in self._ahead else None
                    output = model.run(layer, weights, hidden, predictors.get(run), before)
                    if run == DENSE:
                        self._count_guesses(layer, first, last, output, predictors)
                    self._hidden[run].write(first, output.hidden)
                    if run in self._before:
                        self._before[run].write(first, output.ffn_in)
                    self._progress((last - first) * (token_ids.shape[1] - 1))

    def _count_guesses(
        self, layer: int, first: int, last: int, output: LayerOutput, predictors: dict[str, LayerPredictor]
    ) -> None:
        before = self._before[DENSE].read(first, last) if layer and self._ahead else output.ffn_in
        for name, predictor in predictors.items():
            inputs = before if name in self._ahead else output.ffn_in
            for window, active in zip(inputs, output.active, strict=True):
                scores = np.asarray(predictor.scores(on_device(window)))
                self.counts[name][layer].add(scores, predictor.threshold, active)

    def compare_texts(self) -> dict[str, TextFigures]:
        """Next-token distributions of every run, beside the dense one's."""
        figures = {run: TextFigures() for run in (DENSE, *self._names)}
        for number, token_ids in enumerate(self._windows.token_ids):
            hidden = {run: self._hidden[run].read(number, number + 1)[0] for run in figures}
            scored = len(token_ids) - 1
            for start in range(0, scored, _LOGIT_TOKENS):
                stop = min(start + _LOGIT_TOKENS, scored)
                logits = self._model.logits([hidden[run][start:stop] for run in figures])
                targets = token_ids[start + 1 : stop + 1]
                for run, values in zip(figures, logits, strict=True):
                    nll, kl, agreed = (np.asarray(part, np.float64) for part in _compared(logits[0], values, targets))
                    sums = figures[run]
                    sums.nll += float(nll.sum())
                    sums.kl += float(kl.sum())
                    sums.agreed += int(agreed.sum())
                    sums.tokens += stop - start
                    self._progress(stop - start)
        return figures


def _compare(
    dense: jax.Array,  # [T, V] f32
    sparse: jax.Array,  # [T, V] f32
    targets: jax.Array,  # [T] int32
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each token: the negative log-likelihood under `sparse`, KL(dense || sparse), and whether both have the same top token."""
    log_p, log_q = jax.nn.log_softmax(dense), jax.nn.log_softmax(sparse)
    nll = -jnp.take_along_axis(log_q, targets[:, None], axis=1)[:, 0]
    return nll, jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1), dense.argmax(1) == sparse.argmax(1)


_compared = jit(_compare)


def _document(
    store: Store, windows: TextWindows, names: Sequence[str], comparison: _Comparison, figures: dict[str, TextFigures]
) -> dict[str, Any]:
    predictors = {}
    for name in names:
        layers, text, info = comparison.counts[name], figures[name], store.predictors[name]
        total = _added(layers)
        predictors[name] = {
            "perplexity": _perplexity(text),
            "kl": text.kl / text.tokens,
            "top1_agreement": text.agreed / text.tokens,
            **total.shares(),
            "bytes": predictor_bytes(store.config, info),
            "method": info.method,
            "curve": total.curve_points(),
            "layers": [
                {
                    "layer": layer,
                    "rank": info.ranks[layer] if info.ranks else None,
                    "threshold": comparison.thresholds[name][layer],
                    **counts.shares(),
                    "curve": counts.curve_points(),
                }
                for layer, counts in enumerate(layers)
            ],
        }
    return {
        "model": str(store.path),
        "text": windows.source,
        "tokens": windows.num_tokens,
        "convention": windows.describe(),
        DENSE: {"perplexity": _perplexity(figures[DENSE])},
        "predictors": predictors,
    }


def _perplexity(figures: TextFigures) -> float:
    return math.exp(min(figures.nll / figures.tokens, 700))  # beyond, it would be no number


def _added(layers: Sequence[GuessCounts]) -> GuessCounts:
    total = GuessCounts()
    for counts in layers:
        for key in ("pairs", "active", "named", "hits", "repeated", "repeatable", "curve_pairs", "curve"):
            setattr(total, key, getattr(total, key) + getattr(counts, key))
    return total


def _share(part: int, whole: int, empty: float) -> float:
    return part / whole if whole else empty
