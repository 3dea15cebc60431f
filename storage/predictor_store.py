"""Predictors of a store: reading one, and adding one to a store that is whole.

A predictor is written beside the others under a hidden name and renamed when complete; then the store's attributes name it. Whatever
is killed between leaves a store as it was.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ..errors import InflashError
from .layout import ATTRIBUTES_KEY, PREDICTORS_FOLDER, resident_name
from .model_config import ModelConfig
from .predictor_layout import PredictorInfo, predictor_specs
from .resident import save_tensors
from .resident_reader import read_tensors
from .store import Store, open_store, sync_tree

_REMEDY = "make or import this predictor again with --replace"
RESERVED_NAMES = ("auto", "dense", "exact", "none")


def check_name(store: Store, name: str, *, replace: bool = False) -> None:
    """Refuses names that cannot be a predictor's, or are taken.

    Raises:
      InflashError: says why.
    """
    _check_spelling(name)
    if name in store.predictors and not replace:
        raise InflashError(f"{store.path}: there is a predictor {name!r} already; choose another --name, or give --replace")


def load_predictor_layer(store: Store, name: str, layer: int, *, verify: bool = False) -> dict[str, np.ndarray]:
    """One layer's tensors of `predictor_specs`, by neuron, as stored.

    Raises:
      InflashError: they are missing, or contradict the description.
    """
    specs = predictor_specs(store.config, store.predictors[name], layer)
    parts: dict[str, list[np.ndarray]] = {}
    for piece, rows in read_tensors(store.predictor_folder(name, layer), specs, verify=verify, remedy=_REMEDY):
        parts.setdefault(piece.spec.name, []).append(rows)
    return {key: np.concatenate(rows) if len(rows) > 1 else rows[0] for key, rows in parts.items()}


def save_predictor_layer(
    folder: Path, config: ModelConfig, info: PredictorInfo, layer: int, tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes one layer's tensors into `folder`, a predictor's. `info.ranks` needs to be right for this layer only."""
    save_tensors(folder / resident_name(layer), predictor_specs(config, info, layer), lambda name: tensors[name])


def partial_folder(store: Store, name: str) -> Path:
    """Where a predictor is while it is being made."""
    return store.path / PREDICTORS_FOLDER / f".{name}.partial"


@contextmanager
def making_predictor(store: Store, name: str) -> Iterator[Path]:
    """The folder to make a predictor in, locked against others who make one of the same name. It stays: a killed run resumes in it.

    Raises:
      InflashError: the store cannot be written to, or another process makes this predictor now.
    """
    _check_spelling(name)
    folder = partial_folder(store, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InflashError(f"{folder}: the store cannot be written to: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not folder.exists() or os.fstat(descriptor).st_ino != folder.stat().st_ino:
                raise BlockingIOError  # its maker has just removed it
        except BlockingIOError as error:
            raise InflashError(f"{store.path}: another process is making the predictor {name!r}; wait for it") from error
        try:
            yield folder
        finally:
            with suppress(OSError):
                folder.rmdir()  # when there is nothing in it; the lock is still held
    finally:
        os.close(descriptor)


def install_predictor(store: Store, name: str, info: PredictorInfo, layers: Path, *, replace: bool = False) -> Store:
    """Gives the folder `layers` its final place and names it in the store's attributes. Safe to be repeated after a kill.

    Args:
      store: to add to.
      name: of the predictor.
      info: its description.
      layers: complete; may have been moved already by an earlier call that was killed.
      replace: there may be a predictor of this name, which ends here.

    Returns:
      The store with the predictor.

    Raises:
      InflashError: the name was taken meanwhile.
    """
    place = store.path / PREDICTORS_FOLDER / name
    with _locked(store):
        if layers.exists():
            check_name(open_store(store.path), name, replace=replace)
        if not layers.exists() and not place.exists():
            raise InflashError(f"{layers}: expected the layers of the predictor {name!r}, found nothing")
        if layers.exists():
            sync_tree(layers)
            if place.exists():
                _forget(store, name)  # a reader sees the old one, none, or the new one; never a mixture
                shutil.rmtree(place)
            layers.rename(place)
        _change_attributes(store.path, lambda predictors: predictors.update({name: info.to_json()}))
    return open_store(store.path)


def add_predictor(
    store: Store, name: str, info: PredictorInfo, layers: Iterator[Mapping[str, np.ndarray]], *, replace: bool = False
) -> Store:
    """Writes a predictor from its layers' tensors, in order, and names it in the store's attributes."""
    with making_predictor(store, name) as folder:
        if any(entry.name != "layers" for entry in folder.iterdir()):
            raise InflashError(f"{folder}: an unfinished training of this name is there; finish it, or choose another --name")
        complete = folder / "layers"
        try:
            shutil.rmtree(complete, ignore_errors=True)
            for layer, tensors in enumerate(layers):
                save_predictor_layer(complete, store.config, info, layer, tensors)
            if (found := len(list(complete.iterdir()))) != store.config.num_layers:
                raise InflashError(f"predictor {name!r}: expected {store.config.num_layers} layers, found {found}")
            return install_predictor(store, name, info, complete, replace=replace)
        finally:
            shutil.rmtree(complete, ignore_errors=True)


def _check_spelling(name: str) -> None:
    if name in RESERVED_NAMES or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        taken = ", ".join(RESERVED_NAMES)
        raise InflashError(f"predictor name: expected letters, digits, '-', '_' and '.', and none of {taken}; found {name!r}")


def _forget(store: Store, name: str) -> None:
    _change_attributes(store.path, lambda predictors: predictors.pop(name, None))


def _change_attributes(path: Path, change) -> None:
    file = path / "zarr.json"
    document = json.loads(file.read_bytes())
    change(document["attributes"][ATTRIBUTES_KEY].setdefault("predictors", {}))
    temporary = path / f".zarr.json.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)


@contextmanager
def _locked(store: Store) -> Iterator[None]:
    """One process at a time changes the attributes."""
    descriptor = os.open(store.path / PREDICTORS_FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
