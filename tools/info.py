"""`inflash info`: what is in a store."""

import argparse
import json
from typing import Any

from ..storage.layout import FORMAT_VERSION, neuron_bytes, resident_bytes
from ..storage.predictor_layout import SIGN_BITS, predictor_bytes
from ..storage.store import Store, open_store


def run(arguments: argparse.Namespace) -> int:
    document = describe(open_store(arguments.model))
    print(json.dumps(document) if arguments.json else as_text(document))
    return 0


def describe(store: Store) -> dict[str, Any]:
    """The document that `--json` prints; docs/cli.md lists its keys."""
    config = store.config
    sizes = {
        "resident": resident_bytes(config, store.dtype),
        "neurons": neuron_bytes(config, store.dtype),
        "predictors": {name: predictor_bytes(config, info) for name, info in store.predictors.items()},
    }
    return {
        "path": str(store.path),
        "format_version": FORMAT_VERSION,
        "family": config.family,
        "source": store.source,
        "dtype": store.dtype,
        "config": config.to_json(),
        "bundle_bytes": store.bundles.bundle_bytes,
        "bytes": sizes,
        "predictors": {name: info.to_json() for name, info in store.predictors.items()},
        "tokenizer": (store.tokenizer_folder / "tokenizer.json").exists(),
    }


def as_text(document: dict[str, Any]) -> str:
    config, sizes = document["config"], document["bytes"]
    total = sizes["resident"] + sizes["neurons"]
    lines = [
        f"{document['path']}: {document['family']}, from {document['source']}",
        f"  layers           {config['num_layers']} of d_model {config['d_model']}, d_ff {config['d_ff']}, {config['num_heads']} heads",
        f"  vocabulary       {config['vocab_size']}, {config['max_positions']} positions, "
        f"{'with' if document['tokenizer'] else 'without'} tokenizer",
        f"  dtype            {document['dtype']}, a neuron is {document['bundle_bytes']} bytes on flash",
        f"  resident         {_mib(sizes['resident'])} ({sizes['resident'] / total:.0%})",
        f"  neurons          {_mib(sizes['neurons'])} ({sizes['neurons'] / total:.0%})",
    ]
    width = max(18, *(len(f"  predictor {name}") for name in ("", *document["predictors"])))
    for name, description in document["predictors"].items():
        size = sizes["predictors"][name]
        label = f"  predictor {name}"
        lines.append(f"{label:{width}} {_mib(size)} ({size / total:.1%}), {_summary(description)}")
    if not document["predictors"]:
        lines.append("  predictors       none")
    lines.append(f"  format version   {document['format_version']}")
    return "\n".join(lines)


def _summary(description: dict[str, Any]) -> str:
    ranks = ", ".join(map(str, sorted(set(description["ranks"]))))
    words = ["sign bits" if description["kind"] == SIGN_BITS else f"rank {ranks}"]
    words += ["a layer ahead"] if description["ahead"] else []
    words += [f"for recall {description['recall']:.3g}"] if description["recall"] else []
    return ", ".join(words)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:10.1f} MiB"
