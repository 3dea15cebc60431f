"""The page of counters that every engine keeps: what it shows, and what is said where there is none."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import synthetic_store

from inflash.errors import InflashError
from inflash.pipeline.engine import Engine
from inflash.pipeline.live import LivePage, LiveReader, running_engines
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.step_times import StepTimes

pytestmark = pytest.mark.filterwarnings("ignore:.*direct I/O is refused:RuntimeWarning")


def test_an_engine_shows_its_counters_from_outside(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "store", num_layers=2)
    with Engine(store, EngineOptions(loaders=2, cache_neurons=0.1)) as engine:
        engine.prepare(1, 64)
        reader = LiveReader(os.getpid())
        assert reader.read().times == StepTimes() and not reader.ended
        engine.process_prompts([(0, np.arange(5, dtype=np.int32))])
        for position in range(5, 9):
            engine.decode(np.array([position], np.int32), np.array([position], np.int32), np.ones(1, bool))
        deadline = time.monotonic() + 30  # loaders count after they report
        while (
            sum(c["bytes"] for c in reader.read().loaders.values()) < engine.pool.bytes_requested and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        found = reader.read()
        assert found.times == engine.times and found.times.steps == 4 and found.times.misses > 0
        assert list(found.loaders) == engine.pool.process_ids
        totals = {name: sum(loader[name] for loader in found.loaders.values()) for name in ("bytes", "reads", "under_way")}
        assert totals == {"bytes": engine.pool.bytes_requested, "reads": engine.pool.counters()["reads"], "under_way": 0}
        assert reader.about["options"]["cache_neurons"] == 0.1 and reader.about["predictor"] == "planted"
        assert os.getpid() in running_engines()
    assert reader.read().times == found.times and reader.ended  # also when the engine is gone
    with pytest.raises(InflashError, match=f"process {os.getpid()}: expected a running inflash engine, found none"):
        LiveReader(os.getpid())


def test_a_store_with_a_long_name_is_left_out() -> None:
    page = LivePage({"model": "x" * 5000}, 0, [])
    try:
        assert os.getpid() in running_engines()
    finally:
        page.close()
        page.close()


def test_an_engine_that_was_ended_while_it_wrote() -> None:
    """Its number stays odd for ever."""
    slab = os.memfd_create("inflash-slab")
    page = LivePage({}, slab, [])
    try:
        os.ftruncate(slab, 4096)
        reader = LiveReader(os.getpid())
        assert reader.read().times == StepTimes()
        page._page[0] = 7
        with pytest.raises(InflashError, match=f"process {os.getpid()}: its engine has just ended"):
            reader.read()
    finally:
        page.close()
        os.close(slab)


def test_a_process_that_is_not_there() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(InflashError, match=f"process {process.pid}: there is no such process"):
        LiveReader(process.pid)


def test_an_engine_that_has_just_begun_its_page_is_not_there_yet() -> None:
    pages = [os.memfd_create("inflash-live"), os.memfd_create("inflash-live")]
    try:
        os.ftruncate(pages[1], 4096)
        os.pwrite(pages[1], b'{"version": "', 1024)
        assert os.getpid() not in running_engines()
        with pytest.raises(InflashError, match="found none in it"):
            LiveReader(os.getpid())
    finally:
        for page in pages:
            os.close(page)
