"""`inflash bench ablation`: the paper's table, step by step, on this machine. Reference: arXiv:2312.11514, Tables 2 and 3.

Every row is a real run of the same engine with parts switched off, in a process of its own and, where a cgroup can be made, under the
same memory limit. Caches are as large as the limit allows after everything else that the row needs.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InflashError, RunError
from ..storage.split_rows import split_rows
from ..storage.store import Store, open_store, remove_leftovers
from .memory_group import MemoryGroup, NoCgroup, memory_group
from .progress import bytes_bar, progress_bar
from .row_process import running_row
from .table import table

ROWS = ("naive", "hybrid", "predictor", "window", "bundles", "overlap", "lookahead", "resident")
WHAT = {
    "naive": "everything streamed from flash for every token",
    "hybrid": "attention and embeddings resident",
    "predictor": "+ only predicted neurons, two reads each",
    "window": "+ the neurons used most stay in memory",
    "bundles": "+ a neuron is one read",
    "overlap": "+ hits are computed while misses load",
    "lookahead": "+ neurons are read before their layer",
    "resident": "dense, the whole model in memory",
}
_UNBUNDLED = ("predictor", "window")
_STREAMED_WARM_UP = 2  # nothing is cached there
_HEADROOM = 0.02  # of the limit, for what no account has: page tables, buffers of the kernel
_ALLOCATOR_BYTES = 64 << 20  # what malloc kept beyond the program's account with OPT-1.3B's shape, which the kernel ended for it


def run(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.model)
    rows = [name for name in ROWS if name in arguments.rows]
    if arguments.plot:
        from .plot_file import check_plot

        check_plot(arguments.plot)
    configs = _configs(store, arguments, rows)
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        split = _split_copy(stack, store, arguments, rows)
        steps = sum(config["warm_up"] + config["tokens"] for config in configs.values())
        bar = stack.enter_context(progress_bar(total=steps, desc="measuring", unit=" tokens"))
        try:
            for name, config in configs.items():
                bar.set_description(name)
                config["split_rows"] = str(split) if name in _UNBUNDLED else ""
                results.append({"name": name, **_run_row(name, config, arguments.memory_limit, bar.update)})
        finally:  # rows take minutes each: one that fails takes none of the others along
            bar.close()
            if results:
                _report(store, arguments, results)
    return 0


def _configs(store: Store, arguments: argparse.Namespace, rows: list[str]) -> dict[str, dict[str, Any]]:
    """The rows' settings, checked before the first of them starts.

    Raises:
      InflashError: the limit is too small, or the store lacks a predictor.
    """
    from ..pipeline.memory_parts import slots_within
    from ..pipeline.options import EngineOptions
    from ..pipeline.predictors import choose_predictor, choose_prefetch

    length = arguments.prompt_tokens + arguments.warm_up + arguments.tokens
    if length > store.config.max_positions:
        raise InflashError(
            f"{store.path}: {length} tokens asked for, found {store.config.max_positions} positions; ask for fewer --tokens"
        )
    common = {"loaders": arguments.loaders, "queue_depth": arguments.queue_depth, "max_num_seqs": 1, "max_model_len": length}
    configs: dict[str, dict[str, Any]] = {}
    for name in reversed(rows):  # later rows need more memory: the first complaint names what would do for all
        options: dict[str, Any] = {**common, "ffn": name if name in ("naive", "hybrid", "resident") else "sparse"}
        if options["ffn"] == "sparse":
            options |= {"predictor": arguments.predictor, "overlap": name in ("overlap", "lookahead")}
            options["prefetch"] = arguments.prefetch if name == "lookahead" else "none"
            kept = {"policy": "window", "window": arguments.window} if arguments.window else {"policy": arguments.policy}
            options |= {"policy": "none"} if name == "predictor" else kept
            predictor = choose_predictor(store, arguments.predictor)
            if name == "lookahead" and choose_prefetch(store, arguments.prefetch, predictor) is None:
                raise InflashError(
                    f"{store.path}: the row lookahead needs a look-ahead predictor beside a predictor of the store, found "
                    f"--prefetch {arguments.prefetch} with --predictor {predictor}; make one with inflash train-predictor "
                    "--look-ahead, or leave the row out with --rows"
                )
            limit = int(arguments.memory_limit * (1 - _HEADROOM)) - _ALLOCATOR_BYTES
            try:
                options["cache_neurons"] = slots_within(store, EngineOptions(**options), limit, 1, length)
            except InflashError as error:
                raise InflashError(
                    f"{store.path}: row {name}: {error}, which is --memory-limit less {_HEADROOM:.0%} and "
                    f"{_ALLOCATOR_BYTES >> 20} MiB for what no account has"
                ) from error
        configs[name] = {
            "model": str(arguments.model),
            "options": options,
            "split_rows": "",
            "prompt_tokens": arguments.prompt_tokens,
            "warm_up": arguments.warm_up if options["ffn"] == "sparse" else _STREAMED_WARM_UP,
            "tokens": arguments.tokens,
            "seed": arguments.seed,
        }
    return {name: configs[name] for name in rows}


def _split_copy(stack: contextlib.ExitStack, store: Store, arguments: argparse.Namespace, rows: list[str]) -> Path | None:
    """A copy of the neurons without bundles beside the model, for as long as the rows run that need it."""
    if not set(rows) & set(_UNBUNDLED):
        return None
    beside = (arguments.scratch or store.path.absolute().parent) / store.path.name
    remove_leftovers(beside, "split")
    folder = beside.with_name(f".{beside.name}.split-{os.getpid()}")
    with bytes_bar(store.config.num_layers * store.bundles.layer_bytes, "copying without bundles") as bar:
        return stack.enter_context(split_rows(store, folder, bar.update))


def _run_row(name: str, config: dict[str, Any], limit: int, progress) -> dict[str, Any]:
    """Runs a row; one that cannot run, like `resident` on a small machine, says why."""
    with _limited(None if name == "resident" else limit) as group, running_row("ablation_row", config, group) as row:
        try:
            return {**row.answer("result", lambda: progress(1)), **row.memory(), "options": config["options"]}
        except InflashError as error:
            if name == "resident":
                return {"skipped": str(error)}
            raise RunError(f"row {name}: {error}; try a larger --memory-limit, or leave the row out with --rows") from error


@contextlib.contextmanager
def _limited(limit: int | None) -> Iterator[MemoryGroup | None]:
    """A cgroup with the limit, or None where there is no limit or no group can be made."""
    if limit is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(limit))
        except NoCgroup as error:
            print(f"no memory cgroup here ({error}): caches are sized for the limit, but nothing enforces it", file=sys.stderr)
            group = None
        yield group


def _report(store: Store, arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    measured = [row for row in results if "skipped" not in row]
    model_bytes = store.num_bytes
    print(
        f"{store.path}: {model_bytes / 2**30:.2f} GiB, memory limit {arguments.memory_limit / 2**30:.2f} GiB "
        f"({100 * arguments.memory_limit / model_bytes:.0f}%), batch 1, prompt of {arguments.prompt_tokens} tokens, "
        f"medians of {arguments.tokens} tokens"
    )
    print(_table(measured))
    for row in results:
        if "skipped" in row:
            print(f"{row['name']}: {row['skipped']}")
    if arguments.plot:
        from .ablation_plot import save_plot

        save_plot(measured, store, arguments.memory_limit, arguments.plot)
        print(f"plot: {arguments.plot}")
    document = {
        "model": str(arguments.model),
        "model_bytes": model_bytes,
        "memory_limit": arguments.memory_limit,
        "prompt_tokens": arguments.prompt_tokens,
        "tokens": arguments.tokens,
        "warm_up": arguments.warm_up,
        "rows": measured,
        "skipped": {row["name"]: row["skipped"] for row in results if "skipped" in row},
    }
    print(json.dumps(document))


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["name"],
            WHAT[row["name"]],
            f"{row['dram_bytes'] / 2**30:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else "-",
            f"{row['flash_bytes_per_token'] / 2**20:.1f}",
            f"{row['reads_per_token']:.0f}",
            f"{row['flash_bytes_per_token'] / max(row['reads_per_token'], 1) / 1024:.0f}",
            f"{row['gb_per_s']:.2f}",
            f"{row['io_wait_ms']:.1f}",
            f"{row['memory_ms']:.1f}",
            f"{row['compute_ms']:.1f}",
            f"{row['total_ms']:.1f}",
            f"{row['tokens_per_s']:.2f}",
            f"{rows[0]['total_ms'] / row['total_ms']:.1f}x",
        ]
        for row in rows
    ]
    memory = ["row", "what", "DRAM GiB", "peak GiB"]
    reads = ["flash MiB/token", "reads/token", "KiB/read", "GB/s"]
    times = ["I/O wait ms", "memory ms", "compute ms", "total ms", "tokens/s", "speed"]
    return table([*memory, *reads, *times], lines)
