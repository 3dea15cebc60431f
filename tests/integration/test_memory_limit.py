"""Memory that a cgroup limits. Skipped, with the reason, where cgroups cannot be made."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.memory_limit import (
    DEFAULT_FLAGS,
    SHAPES,
    TRAINING_TOKENS,
    check,
    check_training,
    inflash,
)
from tiny_models import make_store

from inflash.tools.memory_group import MemoryGroup, NoCgroup, _remove_left, memory_group

pytestmark = pytest.mark.integration

LIMIT = 300 << 20  # enough for the command to start, too little for JAX and the loaders
MANY_LOADERS = "16"  # pages of libraries may be charged to another group, which leaves more of the limit


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    try:
        with memory_group(LIMIT) as made:
            yield made
    except NoCgroup as error:
        pytest.skip(str(error))


def test_a_group_whose_maker_was_killed_goes_when_the_next_is_made(group: MemoryGroup) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, alive = (group.folder.with_name(f"inflash-{pid}-0") for pid in (ended.pid, os.getppid()))
    left.mkdir()
    alive.mkdir()
    try:
        _remove_left(group.folder.parent)
        assert not left.exists() and alive.exists() and group.folder.exists()
    finally:
        alive.rmdir()


def test_one_process_may_have_several_groups(group: MemoryGroup) -> None:
    with memory_group(2 * LIMIT) as other:
        assert other.folder != group.folder and other.folder.exists() and group.folder.exists()
    assert group.folder.exists() and not other.folder.exists()


@pytest.mark.parametrize("mode", ["resident", "sparse"])
def test_the_groups_limit_is_what_a_run_is_measured_by(group: MemoryGroup, tmp_path: Path, mode: str) -> None:
    store = make_store(tmp_path, num_hidden_layers=1)
    body = {"prompt": [5, 6, 7], "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    command = inflash(
        "run-batch",
        "-i",
        tmp_path / "in.jsonl",
        "-o",
        tmp_path / "out.jsonl",
        "--model",
        store.path,
        "--ffn",
        mode,
        "--loaders",
        MANY_LOADERS,
    )
    done = group.run(command, capture_output=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "memory: this run needs" in done.stderr
    available = int(done.stderr.split(" MiB available")[0].split()[-1])
    assert 0 < available <= LIMIT >> 20
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_larger_than_its_memory(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Gigabytes and minutes; also `python tests/integration/memory_limit.py`."""
    if not request.config.getoption("--run-large"):
        pytest.skip("writes 5 GB and takes minutes; give --run-large")
    try:
        figures = check(SHAPES["opt-1.3b"], tmp_path, share=0.75, num_tokens=16, flags=DEFAULT_FLAGS)
    except NoCgroup as error:
        pytest.skip(str(error))
    assert figures["peak_mib"] is None or figures["peak_mib"] <= figures["limit_mib"]


def test_training_on_a_model_twice_its_memory(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Also `python tests/integration/memory_limit.py --job train`."""
    if not request.config.getoption("--run-large"):
        pytest.skip("writes 5 GB and takes minutes; give --run-large")
    try:
        figures = check_training(SHAPES["opt-1.3b"], tmp_path, share=0.5, num_tokens=TRAINING_TOKENS)
    except NoCgroup as error:
        pytest.skip(str(error))
    assert figures["peak_mib"] is None or figures["peak_mib"] <= figures["limit_mib"]
