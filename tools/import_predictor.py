"""`inflash import-predictor`: a predictor made elsewhere, into a store."""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import InflashError
from ..storage.predictor_file import SUFFIX, read_predictor_file
from ..storage.predictor_import import check_threshold, read_torch_predictor
from ..storage.predictor_layout import SIGN_BITS, PredictorInfo, predictor_bytes
from ..storage.predictor_store import add_predictor, check_name
from ..storage.store import Store, open_store

DEFAULT_NAME = "imported"


def run(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.model)
    info, layers = _open(store, arguments.source, look_ahead=arguments.look_ahead)
    name = arguments.name
    if name is None:
        name = DEFAULT_NAME if arguments.source.is_dir() else arguments.source.stem
    check_name(store, name, replace=arguments.replace)
    if arguments.threshold is not None:
        layers = _with_threshold(layers, check_threshold(arguments.threshold, "--threshold"))
        info = replace(info, recall=None)  # which was another threshold's
    store = add_predictor(store, name, info, layers, replace=arguments.replace)
    size = predictor_bytes(store.config, info)
    if arguments.json:
        print(json.dumps({"path": str(store.path), "name": name, **info.to_json(), "bytes": size}))
    else:
        print(
            f"added predictor {name}: {_summary(info)}, {size / 2**20:.1f} MiB; "
            f"judge it with `inflash eval {store.path} --text FILE --predictor {name}`"
        )
    return 0


def _open(store: Store, source: Path, *, look_ahead: bool) -> tuple[PredictorInfo, Iterator[Mapping[str, np.ndarray]]]:
    if source.is_dir():
        return read_torch_predictor(store, source, ahead=int(look_ahead))
    if source.suffix != SUFFIX:
        found = "another file" if source.exists() else "nothing there"
        raise InflashError(
            f"{source}: expected a folder of PowerInfer's or Deja Vu's files, or a {SUFFIX} file of inflash export-predictor, found {found}"
        )
    if look_ahead:
        raise InflashError(
            f"{source}: --look-ahead is for folders of PyTorch files; this file says itself what it was trained on"
        )
    return read_predictor_file(store, source)


def _with_threshold(layers: Iterator[Mapping[str, np.ndarray]], threshold: float) -> Iterator[Mapping[str, np.ndarray]]:
    for tensors in layers:
        yield {**tensors, "threshold": np.full(1, threshold, np.float32)}


def _summary(info: PredictorInfo) -> str:
    least, most = min(info.ranks, default=0), max(info.ranks, default=0)
    what = "sign bits" if info.kind == SIGN_BITS else f"rank {least}" if least == most else f"rank {least} to {most}"
    return f"{what}, a layer ahead" if info.ahead else what
