"""How many neurons a cache misses, by its size: from what a model was seen to name, or assumed.

Axes: T tokens, F d_ff, W bytes of a packed row.

The misses are counted with the engine's own cache, in the order in which a step uses it: first the guess made a layer before, then the
prediction. With B sequences a step names the union of what B tokens name.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InflashError
from ..storage.store import Store
from . import native_library
from .neuron_cache import LeastFrequentlyUsed

SIZES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
"""Sizes of a cache that are tried, as shares of the neurons; none is smaller than what nine of ten steps name."""
BATCHES = (1, 2, 4, 8, 16, 32)
_IN_ONE_TURN = 0.9  # of the steps go through the smallest cache in one turn
_COUNTED = 2 / 3  # of the steps, those at the end: the first ones fill the cache
_ASSUMED_ACTIVE, _ASSUMED_SPREAD = 0.047, 1.5  # of OPT-6.7B's neurons; a quarter of them makes 80 % of the activations


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCurve:
    """One layer, means a step.

    Attributes:
      named, guessed: neurons that the predictor names, and that the guess of the layer before does.
      slots: sizes of a cache, ascending.
      misses: neurons to be read with each of them, without guesses.
      ahead, late: with guesses, neurons that those ask for, and those that are still missing in the layer.
    """

    named: float
    guessed: float
    slots: tuple[int, ...]
    misses: tuple[float, ...]
    ahead: tuple[float, ...]
    late: tuple[float, ...]

    def at(self, name: str, slots: float) -> float:
        """`misses`, `ahead` or `late` for any number of slots."""
        return float(np.interp(slots, self.slots, getattr(self, name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class HitCurves:
    """Every layer's curve for some numbers of sequences.

    Attributes:
      source: where they are from, for people.
      predictor, prefetch: whose names were counted; "" for none.
      batches: a curve for each layer, by number of sequences.
    """

    source: str
    predictor: str
    prefetch: str
    batches: Mapping[int, tuple[LayerCurve, ...]]

    def of(self, num_seqs: int) -> tuple[LayerCurve, ...]:
        """For so many sequences, or the next larger number that there is."""
        return self.batches[min((batch for batch in self.batches if batch >= num_seqs), default=max(self.batches))]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "HitCurves":
        batches: dict[int, tuple[LayerCurve, ...]] = {}
        for batch, curves in document["batches"].items():
            fields: list[dict[str, Any]] = [
                {name: tuple(value) if isinstance(value, list) else value for name, value in curve.items()} for curve in curves
            ]
            batches[int(batch)] = tuple(LayerCurve(**each) for each in fields)
        return cls(**{**document, "batches": batches})


def count_misses(named: np.ndarray, guessed: np.ndarray | None, d_ff: int, num_seqs: int) -> LayerCurve:
    """One layer's curve from what tokens name.

    Args:
      named: [T, W] uint8, bits of the neurons that the predictor names for each token, as `np.packbits` makes them.
      guessed: likewise, by the guess of the layer before; None where nobody guesses.
      d_ff: F.
      num_seqs: B; token t of sequence s is row s * (T // B) + t.
    """
    steps = _unions(named, d_ff, num_seqs)
    guesses = None if guessed is None else _unions(guessed, d_ff, num_seqs)
    enough = max(1, round(float(np.quantile([len(step) for step in steps], _IN_ONE_TURN))))
    sizes = sorted({max(round(share * d_ff), enough) for share in SIZES})
    first = len(steps) - max(1, round(_COUNTED * len(steps)))
    misses = [_run(steps, None, d_ff, size, first)[1] for size in sizes]
    with_guesses = [_run(steps, guesses, d_ff, size, first) for size in sizes] if guesses else [(0.0, m) for m in misses]
    return LayerCurve(
        named=float(np.mean([len(step) for step in steps[first:]])),
        guessed=float(np.mean([len(guess) for guess in guesses[first:]])) if guesses else 0.0,
        slots=tuple(sizes),
        misses=tuple(_falling(misses)),
        ahead=tuple(_falling([ahead for ahead, _ in with_guesses])),
        late=tuple(_falling([late for _, late in with_guesses])),
    )


def _unions(packed: np.ndarray, d_ff: int, num_seqs: int) -> list[np.ndarray]:
    """For each step the neurons that any of its tokens names, [n] int32 each."""
    steps = max(1, len(packed) // num_seqs)
    together = packed[: steps * num_seqs].reshape(-1, steps, packed.shape[1])
    joined = np.bitwise_or.reduce(together, axis=0)
    return [np.flatnonzero(np.unpackbits(row, count=d_ff)).astype(np.int32) for row in joined]


def _run(
    steps: Sequence[np.ndarray], guesses: Sequence[np.ndarray] | None, d_ff: int, num_slots: int, first: int
) -> tuple[float, float]:
    """Neurons asked for by guesses, and by predictions, means over the steps from `first` on."""
    cache = LeastFrequentlyUsed(d_ff, num_slots)
    ahead, late = [], []
    for number, step in enumerate(steps):
        cache.begin_token()
        asked = 0 if guesses is None else len(cache.place(guesses[number][: num_slots // 2]).miss_ids)
        # A step that names more than there are slots takes several turns, as in the engine.
        missing = sum(len(cache.place(step[at : at + num_slots]).miss_ids) for at in range(0, len(step), num_slots))
        if number >= first:
            ahead.append(asked)
            late.append(missing)
    return float(np.mean(ahead)), float(np.mean(late))


def _falling(values: Sequence[float]) -> list[float]:
    """A larger cache never misses more: what differs is chance."""
    return [float(value) for value in np.minimum.accumulate(np.asarray(values))]


def assumed_curves(store: Store) -> HitCurves:
    """For a model of which nothing is known: as sparse as OPT-6.7B, and its neurons used as unevenly."""
    d_ff, num_layers = store.config.d_ff, store.config.num_layers
    quantiles = np.random.default_rng(0).standard_normal(d_ff)
    rates = np.exp(_ASSUMED_SPREAD * quantiles)
    rates = np.minimum(np.sort(rates)[::-1] * _ASSUMED_ACTIVE / rates.mean(), 1.0)
    batches = {}
    for batch in BATCHES:
        used = 1 - (1 - rates) ** batch
        named = float(used.sum())
        sizes = sorted({max(round(share * d_ff), min(round(1.25 * named), d_ff), 1) for share in SIZES})
        misses = [float(used[size:].sum()) for size in sizes]
        curve = LayerCurve(
            named=named,
            guessed=named,
            slots=tuple(sizes),
            misses=tuple(misses),
            ahead=tuple(1.1 * value for value in misses),
            late=tuple(0.1 * value for value in misses),
        )
        batches[batch] = (curve,) * num_layers
    source = "assumed: as sparse as OPT-6.7B; inflash plan --calibrate measures them"
    return HitCurves(source=source, predictor="", prefetch="", batches=batches)


def curves_path(store: Store, predictor: str | None) -> Path:
    """Where a store's curves are kept: in the user's cache, under a name made from where it lies and what it is."""
    stamp = (store.path / "zarr.json").stat()
    parts = (str(store.path.absolute()), str(stamp.st_mtime_ns), str(stamp.st_size), predictor or "")
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return native_library.cache_folder() / "inflash" / f"curves-{digest}.json"


def find_curves(store: Store, predictor: str | None) -> HitCurves:
    """What was measured for a predictor of a store, else assumed."""
    file = curves_path(store, predictor)
    try:
        return HitCurves.from_json(json.loads(file.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it is only a cache
        return assumed_curves(store)


def save_curves(store: Store, curves: HitCurves) -> Path:
    """Keeps curves where `find_curves` looks.

    Raises:
      InflashError: the cache cannot be written.
    """
    file = curves_path(store, curves.predictor)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(curves.to_json()))
    except OSError as error:
        raise InflashError(f"{file}: hit curves cannot be kept: {error.strerror}") from error
    return file


def curves_from_bits(
    source: str,
    predictor: str,
    prefetch: str,
    layers: Sequence[tuple[np.ndarray, np.ndarray | None]],
    d_ff: int,
    progress: Callable[[], object],
) -> HitCurves:
    """All curves from the bits of `count_misses` for each layer; `progress` is called after each curve."""
    most = len(layers[0][0]) // 8  # fewer steps say nothing
    batches: dict[int, tuple[LayerCurve, ...]] = {}
    for batch in [batch for batch in BATCHES if batch == 1 or batch <= most]:
        curves = []
        for named, guessed in layers:
            curves.append(count_misses(named, guessed, d_ff, batch))
            progress()
        batches[batch] = tuple(curves)
    return HitCurves(source=source, predictor=predictor, prefetch=prefetch, batches=batches)
