"""Runs a file of prompts on a Ray cluster, and goes on where it was when it is started again.

    pip install 'inflash[ray]'
    python examples/ray_batch.py --model /shared/opt-6.7b.inflash --copy-to /var/tmp --input prompts.jsonl --output /shared/answers

Each line of the input has an `id` and a `prompt` or `messages`, and perhaps `sampling_params`. The output is a folder of JSON lines with
the same columns, `generated_text` and `__inference_error__`. Rows with an error are tried again by the next run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ray.data  # pyright: ignore[reportMissingImports]

from inflash.pipeline.ray import ERROR, TextGenerator


def finished_ids(folder: Path) -> set[Any]:
    """The ids that have a text. A line that was being written when its job was killed does not count."""
    found = set()
    for file in sorted(folder.glob("*.json*")):
        for line in file.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if not row[ERROR]:
                found.add(row["id"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the store, on a disk that all nodes share, or at the same path on each")
    parser.add_argument("--copy-to", help="a folder on each node, where the store is copied to once")
    parser.add_argument("--input", required=True, help="JSON lines with id and prompt or messages")
    parser.add_argument("--output", required=True, type=Path, help="a folder, on a disk that all nodes share")
    parser.add_argument("--actors", type=int, default=1, help="models in the cluster (1)")
    parser.add_argument(
        "--cpus", type=int, default=2, help="processors of each, so one model a node where nodes have as many (2)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="rows that an actor takes, and loses when it dies (64)")
    parser.add_argument("--max-tokens", type=int, default=64, help="for rows that do not say (64)")
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    done = finished_ids(arguments.output)
    rows = ray.data.read_json(arguments.input).filter(lambda row: row["id"] not in done)
    if not (num_rows := rows.count()):
        print(f"every row of {arguments.input} has its text in {arguments.output}")
        return
    answers = rows.repartition(-(-num_rows // arguments.batch_size)).map_batches(  # what is written together is lost together
        TextGenerator,
        fn_constructor_kwargs={
            "model": arguments.model,
            "copy_to": arguments.copy_to,
            "id_column": "id",
            "sampling_params": {"max_tokens": arguments.max_tokens},
        },
        batch_size=arguments.batch_size,
        concurrency=arguments.actors,
        num_cpus=arguments.cpus,
    )
    answers.write_json(str(arguments.output))


if __name__ == "__main__":
    main()
