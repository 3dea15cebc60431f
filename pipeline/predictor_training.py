"""Training a model's predictors: layer by layer, on disk, resumable at every layer.

Axes: W windows, C tokens of a window, D d_model, F d_ff.

All text goes through layer l; what its FFN read and which neurons were active is kept on disk; predictors of that layer are fitted and
saved; only then comes layer l + 1. Whatever is killed is done again from the last finished layer, with the same result: the order of
pairs, the beginnings and the kernels do not depend on when it was interrupted.

In the predictor's partial folder:

    job.json         what is being made; a run with other settings does not go on with it
    windows.npy      [W, C] the tokens
    progress.json    the layer to do next, and the figures of those done
    hidden_{l}/      [W, C, D] f32, layer l's input
    inputs_{l}/      [W, C, D] what layer l's FFN read, in the dtype of products
    active_{l}/      [W, C, F] bits
    layers/, ahead/  the predictors' finished layers, as in a store
"""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import InflashError
from ..storage.json_files import read_json_object
from ..storage.predictor_layout import BY_NEURON, LOW_RANK, SIGN_BITS, PredictorInfo
from ..storage.predictor_store import check_name, install_predictor, making_predictor, save_predictor_layer
from ..storage.scratch import BitArray, WindowArray
from ..storage.store import Store, open_store, sync_tree
from .layerwise import LayerwisePass
from .predictor_fit import Fit, FitOptions, LayerFit, Pairs
from .text_windows import TextWindows

_OWN, _AHEAD = "layers", "ahead"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """What to make.

    Attributes:
      name: of the predictor in the store.
      fit: how each layer is fitted.
      look_ahead: also make `name + "-ahead"`, which guesses a layer's neurons from the FFN input of the layer before.
      most_share: weights of a predictor, as a share of the model's, that automatic ranks may use.
      replace: a predictor of the same name may be there; it is replaced when the new one is finished.
      restart: drop what an unfinished run has left.
    """

    name: str
    fit: FitOptions
    look_ahead: bool = False
    most_share: float = 0.05
    replace: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.most_share <= 1:
            raise InflashError(
                f"most share: expected a share of the model's weights, more than 0 and at most 1, found {self.most_share}"
            )

    @property
    def names(self) -> dict[str, str]:
        """Predictors to make: folder to name."""
        return {_OWN: self.name} | ({_AHEAD: f"{self.name}-ahead"} if self.look_ahead else {})


class TrainingReport(Protocol):
    """Told how training goes."""

    def began(self, windows: TextWindows, done: Sequence[tuple[int, str, dict[str, Any]]]) -> None:
        """Before the first layer; `done` are those of an earlier run, as `finished` was told of them."""
        ...

    def collected(self, tokens: int) -> None:
        """So many more tokens went through a layer."""
        ...

    def doing(self, words: str) -> None: ...

    def finished(self, layer: int, name: str, fit: dict[str, Any]) -> None:
        """A layer of a predictor is saved; `fit` has rank, loss, recall, active and predicted."""
        ...


def train_predictor(
    store: Store, make_windows: Callable[[], TextWindows], text: dict[str, Any], options: TrainingOptions, report: TrainingReport
) -> Store:
    """Makes predictors from text and adds them to the store.

    Args:
      store: the model.
      make_windows: gives the text; not called when an unfinished run has it.
      text: what tells one text from another, so that a run with another one does not go on with this one's work; "source" for people.
      options: what to make.
      report: progress.

    Returns:
      The store with the predictors.

    Raises:
      InflashError: bad names or settings, an unfinished run with other settings, too little space or memory.
    """
    if options.fit.rank is not None and not 1 <= options.fit.rank <= store.config.d_model:
        raise InflashError(f"rank: expected auto, or 1 to d_model = {store.config.d_model}, found {options.fit.rank}")
    with ExitStack() as locks:
        folders = [locks.enter_context(making_predictor(store, name)) for name in options.names.values()]
        folder = folders[0]
        for part, name in options.names.items():
            # What an unfinished run has moved to its place already is its own.
            if (folder / part).exists() or not (folder / "job.json").exists():
                check_name(open_store(store.path), name, replace=options.replace)
        windows = _resume(store, folder, _job(store, text, options), make_windows, options)
        trained = _Training(store, folder, windows, options, report).run()
        _clear(folder)
    return trained


def _job(store: Store, text: dict[str, Any], options: TrainingOptions) -> dict[str, Any]:
    choices = {"model": store.source, "look_ahead": options.look_ahead, "most_share": options.most_share}
    return text | choices | asdict(options.fit)


def _resume(
    store: Store, folder: Path, job: dict[str, Any], make_windows: Callable[[], TextWindows], options: TrainingOptions
) -> TextWindows:
    """The text: of an unfinished run of the same job, or new."""
    file, tokens = folder / "job.json", folder / "windows.npy"
    if options.restart or not file.exists():
        _clear(folder)
        windows = make_windows()
        _check_space(store, folder, windows, options)
        with tokens.open("wb") as stream:
            np.save(stream, windows.token_ids, allow_pickle=False)
        sync_tree(tokens)
        _write_json(file, job)
        return windows
    found = read_json_object(file)
    if differing := [key for key in job if found.get(key) != job[key]]:
        changes = ", ".join(f"{key} {found.get(key)!r}, now {job[key]!r}" for key in differing)
        raise InflashError(
            f"{folder}: an unfinished run made this predictor with other settings ({changes}); "
            "give the same ones to go on with it, another --name, or --restart to drop its work"
        )
    return TextWindows(token_ids=np.load(tokens, allow_pickle=False), source=job["source"])


def _check_space(store: Store, folder: Path, windows: TextWindows, options: TrainingOptions) -> None:
    """Hidden states of two layers, FFN inputs of one or two, and bits of activity, before anything is written."""
    config, itemsize = store.config, 4 if store.dtype == "float32" else 2
    inputs = (2 if options.look_ahead else 1) * itemsize * config.d_model
    needed = windows.token_ids.size * (2 * 4 * config.d_model + inputs + config.d_ff // 8)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InflashError(
            f"{folder}: the pairs of a layer need up to {needed / 2**30:.2f} GiB, found {free / 2**30:.2f} GiB free; "
            "free some space, or use fewer --tokens"
        )


class _Training:
    """One run, from where the last one was."""

    def __init__(
        self, store: Store, folder: Path, windows: TextWindows, options: TrainingOptions, report: TrainingReport
    ) -> None:
        self._store, self._folder, self._windows, self._options, self._report = store, folder, windows, options, report
        self._progress_file = folder / "progress.json"
        self._progress: dict[str, Any] = {"layer": 0, "collected": False, "fits": {part: [] for part in options.names}}
        if self._progress_file.exists():
            self._progress = read_json_object(self._progress_file)

    def run(self) -> Store:
        layers = range(self._progress["layer"], self._store.config.num_layers)
        fits = self._progress["fits"]
        done = [(layer, name, fits[part][layer]) for layer in range(layers.start) for part, name in self._options.names.items()]
        self._report.began(self._windows, done)
        if layers:
            with LayerwisePass(self._store, self._windows.context) as model:
                for layer in layers:
                    self._do_layer(model, layer)
        return self._install()

    def _do_layer(self, model: LayerwisePass, layer: int) -> None:
        if not self._progress["collected"]:
            self._collect(model, layer)
            self._advance(collected=True)
        up_rows, up_bias = model.up_rows(layer), model.up_bias(layer)
        fits = self._progress["fits"]
        for part, name in self._options.names.items():
            del fits[part][layer:]  # of a run that was killed between the two predictors of a layer
            pairs = Pairs(self._inputs(model, max(layer - (part == _AHEAD), 0)), self._active(layer))
            fit = LayerFit(
                pairs,
                up_rows,
                up_bias,
                self._options.fit,
                dtype=model.engine.compute.name,
                most_rank=self._options.fit.rank or self._most_rank(part, layer),
                report=lambda words, name=name: self._report.doing(f"layer {layer}, {name}: {words}"),
            ).best()
            self._save(part, layer, fit)
            fits[part].append({key: getattr(fit, key) for key in ("rank", "loss", "recall", "active", "predicted")})
            self._report.finished(layer, name, fits[part][-1])
            if self._options.fit.rank is None and fit.rank is not None and not fit.does(self._options.fit):
                warnings.warn(
                    f"layer {layer}, {name}: {fit.predicted / max(fit.active, 1e-9):.1f} times as many neurons are named as are active; "
                    f"rank {fit.rank} was the largest within most_share {self._options.most_share}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._advance(layer=layer + 1, collected=False)
        read = (
            layer - 1 if self._options.look_ahead else layer
        )  # a predictor that looks ahead reads the last layer's inputs again
        for done in (f"hidden_{layer}", f"active_{layer}", f"inputs_{read}"):
            shutil.rmtree(self._folder / done, ignore_errors=True)

    def _collect(self, model: LayerwisePass, layer: int) -> None:
        """All text through one layer."""
        token_ids, group = self._windows.token_ids, model.group
        for begun in (f"inputs_{layer}", f"active_{layer}", f"hidden_{layer + 1}"):
            shutil.rmtree(self._folder / begun, ignore_errors=True)  # a kill may have left half a file
        inputs, active = self._inputs(model, layer, create=True), self._active(layer, create=True)
        following = self._hidden(layer + 1, create=True)
        with model.attention(layer) as weights:
            for first in range(0, len(token_ids), group):
                last = min(first + group, len(token_ids))
                hidden = self._hidden(layer).read(first, last) if layer else model.embed(token_ids[first:last])
                output = model.run(layer, weights, hidden)
                inputs.write(first, output.ffn_in)
                active.write(first, output.active)
                if layer + 1 < self._store.config.num_layers:
                    following.write(first, output.hidden)
                self._report.collected((last - first) * (token_ids.shape[1] - 1))
        for array in ("inputs", "active"):
            sync_tree(self._folder / f"{array}_{layer}")
        sync_tree(self._folder / f"hidden_{layer + 1}")

    def _save(self, part: str, layer: int, fit: Fit) -> None:
        order = self._store.neuron_order(layer)
        tensors = {}
        for name, values in fit.tensors.items():
            tensors[name] = values
            if name in BY_NEURON:
                tensors[name] = np.empty_like(values)
                tensors[name][order] = values
        ranks = (fit.rank or 1,) * self._store.config.num_layers
        folder = self._folder / part
        shutil.rmtree(folder / f"layer_{layer}", ignore_errors=True)
        save_predictor_layer(folder, self._store.config, replace(self._info(part), ranks=ranks), layer, tensors)
        sync_tree(folder / f"layer_{layer}")

    def _info(self, part: str) -> PredictorInfo:
        fit = self._options.fit
        return PredictorInfo(
            kind=SIGN_BITS if fit.method == "sign-bits" else LOW_RANK,
            method=fit.method.replace("-", "_"),
            dtype="float32" if self._store.dtype == "float32" else "bfloat16",
            ahead=int(part == _AHEAD),
            recall=fit.recall,
            tokens=self._windows.num_tokens,
        )

    def _install(self) -> Store:
        store = self._store
        for part, name in self._options.names.items():
            ranks = tuple(fit["rank"] for fit in self._progress["fits"][part] if fit["rank"])
            info = replace(self._info(part), ranks=ranks)
            store = install_predictor(store, name, info, self._folder / part, replace=self._options.replace)
        return store

    def _most_rank(self, part: str, layer: int) -> int:
        """No more than that: what the layers before have left of the allowed share is divided over this one and those that follow."""
        if self._options.fit.method == "sign-bits":
            return 1
        config = self._store.config
        itemsize = self._store.bundles.row_bytes // config.d_model
        weights = self._store.num_bytes // itemsize
        each = config.d_model + config.d_ff
        spent = sum((fit["rank"] or 0) * each + config.d_ff for fit in self._progress["fits"][part][:layer])
        left = (self._options.most_share * weights - spent) / (config.num_layers - layer) - config.d_ff
        if left < each:
            raise InflashError(
                f"most share: expected room for rank 1 at least, {each + config.d_ff} weights a layer, found {left + config.d_ff:.0f} in "
                f"layer {layer}; give a larger --most-share, or a fixed --rank"
            )
        return int(left / each)

    def _advance(self, **changes: Any) -> None:
        self._progress |= changes
        _write_json(self._progress_file, self._progress)

    def _hidden(self, layer: int, *, create: bool = False) -> WindowArray:
        return self._floats(f"hidden_{layer}", "float32", create=create)

    def _inputs(self, model: LayerwisePass, layer: int, *, create: bool = False) -> WindowArray:
        return self._floats(f"inputs_{layer}", model.engine.compute.name, create=create)

    def _floats(self, name: str, dtype: str, *, create: bool) -> WindowArray:
        shape = (*self._windows.token_ids.shape, self._store.config.d_model)
        return WindowArray(self._folder / name, shape, dtype, create=create)

    def _active(self, layer: int, *, create: bool = False) -> BitArray:
        shape = (*self._windows.token_ids.shape, self._store.config.d_ff)
        return BitArray(self._folder / f"active_{layer}", shape, create=create)


def _clear(folder: Path) -> None:
    """Empties the folder, what says how far a run has come first: a kill in between leaves nothing to go on with."""
    for name in ("job.json", "progress.json"):
        (folder / name).unlink(missing_ok=True)
    sync_tree(folder)
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _write_json(file: Path, document: dict[str, Any]) -> None:
    """Replaces the file as a whole."""
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sync_tree(temporary.parent / temporary.name)
    temporary.rename(file)
