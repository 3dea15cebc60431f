"""`inflash bench batch`: how many requests have to decode together until reading neurons in order beats reading the predicted ones.

A decoding step reads what any of its sequences needs. For one that is a few percent of the neurons, at the disk's random rate; for many it
nears all of them, and then the disk's sequential rate wins. Each row is a process of its own that is planned for the memory limit and held
to it by a cgroup.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InflashError
from ..storage.store import Store, open_store
from .memory_group import memory_group_where_possible
from .progress import progress_bar
from .row_process import ALLOWANCE_BYTES, running_row
from .table import table


def run(arguments: argparse.Namespace) -> int:
    from .plan_text import tokens_for

    if arguments.plot:
        from .plot_file import check_plot

        check_plot(arguments.plot)
    store = open_store(arguments.model)
    most = arguments.requests or max(arguments.batch)
    token_ids, source = tokens_for(store, arguments.text, most, arguments.prompt_tokens)
    runs = _runs(arguments, store, token_ids)
    results: list[dict[str, Any]] = []
    with progress_bar(total=len(runs), desc="measuring", unit=" runs") as bar:
        try:
            for row, config in runs:
                results.append(row | _measured(arguments.model, config))
                bar.update()
        finally:  # a run takes minutes: what interrupts one takes none of the others along
            bar.close()
            if results:
                _report(store, arguments, results, source)
    return 0


def _runs(arguments: argparse.Namespace, store: Store, token_ids: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row's first figures, and the settings of its process."""
    from ..pipeline.fixed_shapes import capacity_for
    from ..pipeline.memory_parts import kv_cache_bytes

    runs, length = [], arguments.prompt_tokens + arguments.tokens
    for batch in arguments.batch:
        memory = arguments.memory_limit
        if arguments.kv_on_top:
            memory += kv_cache_bytes(store, (batch - 1) * capacity_for(length))
        for path in arguments.paths:
            config = {
                "memory": memory,
                "path": path,
                "batch": batch,
                "prompts": token_ids[: arguments.requests or batch].tolist(),
                "tokens": arguments.tokens,
            }
            runs.append(({"batch": batch, "path": path, "memory_bytes": memory}, config))
    return runs


@dataclass(frozen=True, slots=True)
class Crossover:
    """Between which batches the dense path becomes the faster way of decoding.

    Attributes:
      sparse_up_to: the largest batch that decoded faster on the sparse path; None: no batch did.
      dense_from: the smallest above it, which decoded faster on the dense path; None: there is none.
    """

    sparse_up_to: int | None
    dense_from: int | None

    @property
    def sentence(self) -> str:
        if self.sparse_up_to is None:
            return f"the dense path decodes faster for a batch of {self.dense_from} already"
        if self.dense_from is None:
            return f"the sparse path decodes faster for a batch of {self.sparse_up_to} still"
        return f"the sparse path decodes faster up to a batch of {self.sparse_up_to}, the dense path from {self.dense_from} on"


def find_crossover(rows: Sequence[Mapping[str, Any]]) -> Crossover | None:
    """Of rows of both ways, by the time for decoding; None without any pair."""
    seconds = {(row["path"], row["batch"]): row["decode_s"] for row in rows}
    batches = sorted(batch for path, batch in seconds if path == "sparse" and ("dense", batch) in seconds)
    if not batches:
        return None
    faster = [batch for batch in batches if seconds["sparse", batch] <= seconds["dense", batch]]
    above = [batch for batch in batches if not faster or batch > faster[-1]]
    return Crossover(faster[-1] if faster else None, above[0] if above else None)


def _measured(model: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A row's run in a cgroup: what `batch_row` found, or `failed`."""
    with (
        memory_group_where_possible(config["memory"] + ALLOWANCE_BYTES) as group,
        running_row("batch_row", {"model": str(model), **config}, group) as row,
    ):
        try:
            return {**row.answer("result"), **row.memory()}
        except InflashError as error:
            return {"failed": str(error)}


def _report(store: Store, arguments: argparse.Namespace, results: list[dict[str, Any]], source: str) -> None:
    measured = [row for row in results if "failed" not in row]
    print(
        f"{store.path}: {store.num_bytes / 2**30:.2f} GiB, memory limit {arguments.memory_limit / 2**30:.2f} GiB"
        f"{', KV cache on top' if arguments.kv_on_top else ''}; "
        f"{f'{arguments.requests} requests, ' if arguments.requests else ''}prompts of {arguments.prompt_tokens} tokens from {source}, "
        f"{arguments.tokens} tokens each\n"
    )
    rows = [
        [
            row["batch"],
            row["path"],
            row["together"],
            f"{row['tokens_per_s']:.2f}",
            f"{row['read_mib_per_token']:.1f}",
            f"{100 * row['dense_share']:.0f}%",
            f"{100 * row['cache_share']:.0f}%",
            f"{row['prompt_s']:.1f}",
            f"{row['decode_s']:.1f}",
            f"{row['io_wait_s']:.1f}",
            f"{row['peak_bytes'] / 2**20:.0f} of {row['memory_bytes'] / 2**20:.0f}" if row["peak_bytes"] else "-",
        ]
        for row in measured
    ]
    header = ["batch", "path", "together", "tokens/s", "MiB/token", "dense", "in memory"]
    print(table([*header, "prompts s", "decoding s", "of that I/O wait s", "peak MiB"], rows))
    crossover = find_crossover(measured)
    if crossover is not None:
        print(f"\ncrossover: {crossover.sentence}")
    for row in results:
        if "failed" in row:
            print(f"batch {row['batch']}, {row['path']}: {row['failed']}")
    if arguments.plot and measured:
        from .batch_plot import save_plot

        save_plot(measured, store, arguments.plot)
        print(f"plot: {arguments.plot}")
    document = {
        "model": str(arguments.model),
        "model_bytes": store.num_bytes,
        "memory_limit": arguments.memory_limit,
        "prompt_tokens": arguments.prompt_tokens,
        "tokens": arguments.tokens,
        "rows": results,
        "crossover": None if crossover is None else asdict(crossover),
    }
    print(json.dumps(document))
