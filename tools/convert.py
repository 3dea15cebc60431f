"""`inflash convert`: a checkpoint in, a store out."""

import argparse

from .progress import bytes_bar


def run(arguments: argparse.Namespace) -> int:
    from ..storage.checkpoint import open_source
    from ..storage.convert import bytes_to_write, convert

    rank = 0 if arguments.no_predictor else arguments.predictor_rank
    with open_source(arguments.source) as source:
        dtype = source.dtype if arguments.dtype == "auto" else arguments.dtype
        total = bytes_to_write(source, dtype)
        with bytes_bar(total, "converting") as bar:
            store = convert(source, arguments.destination, dtype=dtype, predictor_rank=rank, progress=bar.update)
    print(f"{store.path}: {store.config.family}, {store.config.num_layers} layers, {total / 2**20:.1f} MiB in {store.dtype}")
    return 0
