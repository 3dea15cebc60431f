"""`inflash top`: what it shows of a running engine, line by line and on a screen."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import synthetic_store

from inflash.pipeline.channel import COUNTERS
from inflash.pipeline.engine import Engine
from inflash.pipeline.live import LiveCounters, LivePage
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.step_times import StepTimes
from inflash.tools import cli, top
from inflash.tools.process_sampler import ProcessSample
from inflash.tools.top import Change, Look

pytestmark = pytest.mark.filterwarnings("ignore:.*direct I/O is refused:RuntimeWarning")


@pytest.fixture(scope="module")
def decoding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that decodes in another thread."""
    store, stop = synthetic_store(tmp_path_factory.mktemp("model") / "store", num_layers=2), threading.Event()
    with Engine(store, EngineOptions(cache_neurons=0.1)) as engine:
        engine.prepare(1, 64)

        def work() -> None:
            for position in range(10**9):
                if stop.is_set():
                    return
                engine.decode(np.array([position % 500], np.int32), np.array([position % 60], np.int32), np.ones(1, bool))

        thread = threading.Thread(target=work)
        thread.start()
        yield engine
        stop.set()
        thread.join()


def is_mapped(descriptor: int) -> bool:
    """Whether this process maps just that memory: what other tests' engines had may wait for a garbage collection."""
    inode = str(os.fstat(descriptor).st_ino)
    return any(line.split()[4] == inode for line in Path("/proc/self/maps").read_text().splitlines() if "inflash-slab" in line)


def test_the_next_engine_of_a_process_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer requests make a process open another engine; whoever looks must let the first one's memory go."""
    slab, opened = os.memfd_create("inflash-slab"), threading.Event()
    os.ftruncate(slab, 4096)
    pages, let_go = [LivePage({"model": "first"}, slab, [(os.getpid(), 0)])], []

    def change() -> None:
        time.sleep(0.5)
        pages[0].close()
        deadline = time.monotonic() + 30  # a look at a process takes its time on a busy machine
        while (mapped := is_mapped(slab)) and time.monotonic() < deadline:
            time.sleep(0.02)
        let_go.append(not mapped)
        pages.append(LivePage({"model": "second"}, slab, [(os.getpid(), 0)]))
        opened.set()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert cli.main(["top", str(os.getpid()), "--interval", "0.2", "--count", "6"]) == 0
    finally:
        thread.join()
        for page in pages:
            page.close()
        os.close(slab)
    assert opened.is_set() and let_go == [True] and len(capsys.readouterr().out.splitlines()) == 8


def test_lines_for_a_file(decoding: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    while decoding.times.steps < 2:
        time.sleep(0.01)
    assert cli.main(["top", str(os.getpid()), "--interval", "0.3", "--count", "2"]) == 0
    heading, header, *lines = capsys.readouterr().out.splitlines()
    assert f"inflash engine {os.getpid()}, store, up 0:" in heading and "cache neurons 0.1" in heading
    assert header.split()[:2] == ["time", "tokens/s"] and len(lines) == 2
    for line in lines:
        clock, tokens_per_s, step_ms, *parts = line.split()[:6]
        assert re.fullmatch(r"\d\d:\d\d:\d\d", clock) and float(tokens_per_s) > 0
        assert sum(map(float, parts)) == pytest.approx(float(step_ms), abs=0.2)
        assert "\x1b" not in line and line.rstrip().endswith(("MiB", "GiB"))


def test_a_terminal_is_drawn_again_until_the_engine_ends(
    decoding: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([top._look, top._look, lambda _: None])
    monkeypatch.setattr(top, "_look", lambda reader: next(looks)(reader))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["top", str(os.getpid()), "--interval", "0.05"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("\x1b[H\x1b[2Jinflash engine ") and out.count("\x1b") == 2  # cleared once, and no colours
    assert "tokens/s" in out and "loader 0" in out and out.endswith(f"process {os.getpid()} has ended\n")


def look(at_ns: int, cpu_s: float, **times: int) -> Look:
    loader = dict.fromkeys(COUNTERS, 0) | {"bytes": 3_000_000 * times["steps"], "under_way": 9}
    processes = {
        pid: ProcessSample(at_ns=at_ns, user_s=cpu_s, system_s=0.0, rss_bytes=1, minor_faults=0, major_faults=0, threads=3)
        for pid in (1, 2)
    }
    return Look(counters=LiveCounters(at_ns=at_ns, times=StepTimes(**times), loaders={2: loader}), processes=processes)


def test_figures_are_of_the_time_between_two_looks() -> None:
    usual = {"tokens": 8, "decode_ns": 8_000_000, "io_wait_ns": 2_000_000, "memory_ns": 0, "hits": 10, "misses": 10}
    before, now = (
        look(10**9, 1.0, steps=4, **usual),
        look(3 * 10**9, 2.0, steps=8, **{name: 4 * value for name, value in usual.items()}),
    )
    change = Change(before, now)
    assert change.tokens_per_s == 12 and change.step_ms == 6 and change.hit_rate == 0.5 and change.under_way == 9
    assert change.parts_ms == {"I/O wait": 1.5, "memory": 0.0, "compute": 4.5} and change.bytes_per_s == 6_000_000
    coloured, plain = "\n".join(change.screen(colour=True)), "\n".join(change.screen(colour=False))
    assert "\x1b[31m" in coloured and "\x1b" not in plain
    bar = re.search(r"#+-+", plain)
    assert bar is not None and bar.group().count("-") == pytest.approx(3 * bar.group().count("#"), abs=2)
    assert "engine" in plain and "loader 0" in plain and "50 %" in plain and "6 MB/s" in plain
    assert Change(now, now).step_ms == 0 and "no step" in "\n".join(Change(now, now).screen(colour=False))


def test_ctrl_c_ends_it_and_not_the_engine(decoding: Engine) -> None:
    command = [sys.executable, "-c", "import signal, sys; from inflash.tools.cli import main\n"
               "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main(sys.argv[1:]))"]  # fmt: skip
    watching = subprocess.Popen(
        [*command, "top", str(os.getpid()), "--interval", "0.1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert watching.stdout is not None
    for _ in range(3):
        watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=30)
    assert (watching.returncode, errors) == (0, "")
    before = decoding.times.steps
    while decoding.times.steps < before + 2:
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--interval", "0"], "--interval: expected seconds above 0"),
        (["--count", "0"], "--count: expected a number of looks"),
        ([], "found none in it"),
    ],
)
def test_bad_input_is_one_sentence(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", str(os.getppid()), *given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
