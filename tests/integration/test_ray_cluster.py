"""A Ray Data job on a local cluster of two nodes, as processes: the texts of one process, whatever dies."""

import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import BUFFERED, make_store

from inflash.pipeline.ray import ERROR, TEXT, TextGenerator
from inflash.storage.store import Store

ray: Any = pytest.importorskip("ray", reason="the extra ray is not installed: pip install 'inflash[ray]'")

pytestmark = [pytest.mark.filterwarnings(BUFFERED), pytest.mark.filterwarnings("ignore"), pytest.mark.integration]

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_batch.py"
NUM_ROWS = 48
SETTINGS: dict[str, Any] = {
    "sampling_params": {"max_tokens": 6, "ignore_eos": True},
    "id_column": "id",
    "predictor": "exact",
    "max_num_seqs": 4,
    "queue_depth": 1,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    cluster = importlib.import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    tests = str(Path(__file__).parents[1])  # the workers import this file
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}}
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False, runtime_env=environment)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("ray"), tokenizer=True, num_hidden_layers=1)


def rows() -> list[dict[str, Any]]:
    return [{"id": number, "prompt": f"prompt {number}" if number % 7 else ""} for number in range(NUM_ROWS)]


def expected(store: Store, **settings: Any) -> dict[int, tuple[str, bool]]:
    generator = TextGenerator(store.path, **settings)
    try:
        columns: Any = {name: [row[name] for row in rows()] for name in ("id", "prompt")}
        found = generator(columns)
    finally:
        generator.close()
    return {number: (text, bool(error)) for number, text, error in zip(found["id"], found[TEXT], found[ERROR], strict=True)}


class Watched(TextGenerator):
    """Says which process and node it is, and takes its time, so that there is somebody to kill."""

    def __init__(self, model: str, notes: str, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._notes = Path(notes)

    def __call__(self, batch: Any) -> Any:
        (self._notes / f"{os.getpid()}").write_text(ray.get_runtime_context().get_node_id())
        time.sleep(0.3)
        return super().__call__(batch)


def test_two_nodes_write_what_one_process_would_and_survive_a_death(cluster: Any, store: Store, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while len(list(notes.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        killed.append(int(next(notes.iterdir()).name))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    data = importlib.import_module("ray.data")
    data.DataContext.get_current().enable_progress_bars = False
    answers = data.from_items(rows(), override_num_blocks=16).map_batches(
        Watched,
        fn_constructor_kwargs={"model": str(store.path), "notes": str(notes), "copy_to": str(tmp_path / "flash"), **SETTINGS},
        batch_size=3,
        concurrency=2,
        num_cpus=2,
    )
    found = {row["id"]: (row[TEXT], bool(row[ERROR])) for row in answers.take_all()}
    killer.join()
    assert killed
    nodes = {file.read_text() for file in notes.iterdir()}
    assert len(nodes) == 2
    assert found == expected(store, **SETTINGS)
    assert (tmp_path / "flash" / "store").is_dir()


def test_the_example_goes_on_where_it_was(
    cluster: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def run(lines: list[dict[str, Any]]) -> dict[int, tuple[str, bool]]:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ["--model", str(store.path), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words, "--max-tokens", "6", "--batch-size", "8"])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        found = [json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()]
        texts = {row["id"]: (row[TEXT], bool(row[ERROR])) for row in found}
        assert len(texts) == len(found), "a row was answered twice"
        return texts

    asked = [row for row in rows() if row["prompt"]]
    half = run(asked[:20])
    assert half.keys() == {row["id"] for row in asked[:20]}
    everything = run(asked)
    alone = expected(store, sampling_params={"max_tokens": 6}, id_column="id")
    assert everything == {row["id"]: alone[row["id"]] for row in asked}
    assert run(asked) == everything
    assert "every row of" in capsys.readouterr().out
