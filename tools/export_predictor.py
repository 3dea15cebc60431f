"""`inflash export-predictor`: a store's predictor as one file, to share."""

import argparse

from ..storage.predictor_file import write_predictor_file
from ..storage.store import open_store


def run(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.model)
    write_predictor_file(store, arguments.name, arguments.destination)
    size = arguments.destination.stat().st_size
    print(f"{arguments.destination}: predictor {arguments.name}, {size / 2**20:.1f} MiB")
    return 0
