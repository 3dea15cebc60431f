"""`inflash verify`: every weight of a store against its checksum."""

import argparse
import json

from .progress import bytes_bar

MOST_FAULTS = 10


def run(arguments: argparse.Namespace) -> int:
    from ..storage.layout import neuron_bytes
    from ..storage.store import open_store
    from ..storage.verify import find_faults

    store = open_store(arguments.model)
    total = neuron_bytes(store.config, store.dtype)
    with bytes_bar(total, "verifying") as bar:
        faults = find_faults(store, most=MOST_FAULTS, progress=bar.update)
    if arguments.json:
        print(json.dumps({"path": str(store.path), "sound": not faults, "faults": faults}))
    elif faults:
        print("\n".join(faults))
        more = f" (the first {MOST_FAULTS})" if len(faults) == MOST_FAULTS else ""
        print(f"{store.path}: {len(faults)} fault{'s' if len(faults) > 1 else ''} found{more}; convert the model again")
    else:
        print(f"{store.path}: sound, {store.config.num_layers * store.config.d_ff} neurons checked")
    return 1 if faults else 0
