"""Real loader processes: what they bring, and what happens when something dies."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pipeline_bench import NUM_SLOTS, bench
from tiny_models import flip_byte, write_neurons

from inflash.errors import InflashError, RunError
from inflash.pipeline import loader_pool, trace
from inflash.pipeline.channel import RING_LENGTH
from inflash.pipeline.loader_pool import LoaderPool
from inflash.pipeline.slab import Slab, SlabPlan
from inflash.pipeline.staging import is_staged
from inflash.pipeline.trace_area import TraceArea
from inflash.storage.layout import bundles_path
from inflash.storage.store import Store

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def neurons(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[np.ndarray]]:
    return write_neurons(tmp_path_factory.mktemp("neurons") / "store", dtype="bfloat16", d_model=256, d_ff=500)


@pytest.mark.parametrize(("loaders", "depth"), [(1, 1), (2, 3), (3, 64)])
def test_neurons_arrive_in_their_slots(neurons: tuple[Store, list[np.ndarray]], loaders: int, depth: int) -> None:
    store, layers = neurons
    rng = np.random.default_rng()
    with bench(store, loaders=loaders, depth=depth) as b:
        expected = b.bundles().copy()
        requested = 0
        for _ in range(30):
            layer, count = int(rng.integers(2)), int(rng.integers(1, 501))
            positions = np.sort(rng.choice(500, count, replace=False))
            slots = rng.choice(NUM_SLOTS, count, replace=False)
            b.scatter(layer, positions, slots)
            requested += count * store.bundles.bundle_bytes
            expected[slots] = layers[layer][positions].view(np.uint16)
            np.testing.assert_array_equal(b.bundles(), expected)
        assert b.pool.bytes_requested == requested
        counters = b.pool.counters()
        assert counters["bytes"] == requested
        assert counters["requests"] >= 30
        assert 30 <= counters["reads"] <= requested // store.bundles.bundle_bytes
        assert counters["busy_ns"] > 0
        assert len(set(b.pool.process_ids)) == loaders


def test_ranges_arrive_in_order(neurons: tuple[Store, list[np.ndarray]]) -> None:
    store, layers = neurons
    with bench(store) as b:
        b.pool.wait(b.pool.read_range(1, 20, 450, 100, b.parts))
        for part in range(2):
            np.testing.assert_array_equal(b.rows(part)[100:550], layers[1][20:470, part].view(np.uint16))
            assert not b.rows(part)[:100].any()
            assert not b.rows(part)[550:].any()
        assert b.pool.counters()["bytes"] == b.pool.bytes_requested == 450 * 1024


def test_ranges_of_rows_of_any_size(tmp_path: Path) -> None:
    """Small rows are read in one piece first; several stretches are under way at a time, again and again."""
    for d_model, staged in ((96, True), (2048, True), (2560, False)):  # rows of 192, 4096 and 5120 bytes
        store, layers = write_neurons(tmp_path / str(d_model), dtype="bfloat16", d_model=d_model, d_ff=80)
        assert is_staged(store.bundles.row_bytes, 40 * store.bundles.bundle_bytes) is staged
        with bench(store, loaders=1, depth=8) as b:
            for turn in range(3):
                asked = [
                    (layer, first, 40 * number) for number, (layer, first) in enumerate([(0, turn), (1, 30), (1, 0), (0, 40)])
                ]
                for ticket in [b.pool.read_range(layer, first, 40, slot, b.parts) for layer, first, slot in asked]:
                    b.pool.wait(ticket)
                for layer, first, slot in asked:
                    for part in range(2):
                        expected = layers[layer][first : first + 40, part].view(np.uint16)
                        np.testing.assert_array_equal(b.rows(part)[slot : slot + 40], expected)


@pytest.mark.parametrize(("offset", "length"), [(0, 8192), (4096, 4096 * 700), (123, 45), (4096, 5000), (0, 3_000_001)])
def test_stretches_of_files_arrive(tmp_path: Path, neurons, offset: int, length: int) -> None:
    content = np.random.default_rng().bytes(offset + length + 10)
    files = [tmp_path / "first", tmp_path / "second"]
    for file in files:
        file.write_bytes(content if file.name == "second" else b"wrong")
    with bench(neurons[0], files=files) as b:
        b.pool.wait(b.pool.read_bytes(1, offset, length, b.bytes_at + 4096))
        assert b.raw(length, at=4096) == content[offset : offset + length]
        assert not any(b.raw(4096)) and not any(b.raw(4096, at=4096 + length))
        assert b.pool.counters()["bytes"] == b.pool.bytes_requested == length


def test_nothing_to_read_is_finished_at_once(neurons) -> None:
    with bench(neurons[0]) as b:
        ticket = b.pool.scatter(0, np.empty(0, np.int64), np.empty(0, np.int64), b.slots_at)
        b.pool.wait(ticket)
        assert b.pool.counters()["bytes"] == b.pool.bytes_requested == 0


def test_a_request_is_traced_to_its_own_computation_however_many_there_were(neurons) -> None:
    """Also when its place in the ring is taken by another one."""
    area = TraceArea.make(num_writers=2, num_layers=2, d_ff=500)
    recorder = trace.attach(area.descriptor)
    try:
        with bench(neurons[0], loaders=1) as b:
            for number in range(RING_LENGTH + 20):
                b.scatter(0, np.array([number]), np.array([0]))
                with recorder.span(trace.HITS, 0):
                    pass
        records = area.read(0).records
        asked, used = (records[records["kind"] == kind]["flow"] for kind in (trace.ASK, trace.HITS))
        assert asked.tolist() == used.tolist() and len(set(used.tolist())) == RING_LENGTH + 20
        assert not (records["kind"] == trace.USED).any()
    finally:
        trace.detach()
        area.close()


def test_more_requests_than_the_ring_holds_may_be_under_way(neurons) -> None:
    """The ring wraps twice, and every request still brings its own rows; nobody waits in between."""
    store, layers = neurons
    rng = np.random.default_rng()
    num_requests = 2 * RING_LENGTH + 77
    with bench(store, loaders=1) as b:
        slots = rng.permutation(NUM_SLOTS)
        asked = rng.integers(0, 500, num_requests)
        newest = {int(slots[n % NUM_SLOTS]): int(position) for n, position in enumerate(asked)}
        tickets = [
            b.pool.scatter(0, np.asarray([position]), slots[[n % NUM_SLOTS]], b.slots_at)
            for n, position in enumerate(asked.tolist())
        ]
        assert len({ticket[0][1] for ticket in tickets}) == num_requests
        for ticket in reversed(tickets):
            b.pool.wait(ticket)
        for slot, position in newest.items():
            np.testing.assert_array_equal(b.bundles()[slot], layers[0][position].view(np.uint16))
        assert b.pool.counters()["requests"] == num_requests


def test_what_is_asked_for_ahead_stands_back_and_arrives(neurons) -> None:
    store, layers = neurons
    with bench(store, loaders=1) as b:
        tickets = []
        for turn in range(2 * RING_LENGTH // 3):  # one ahead between two that are not; the ring wraps
            for number, (first, last) in enumerate(((0, 200), (200, 400), (400, 420))):
                ids = np.arange(first, last)
                tickets.append(b.pool.scatter(0, ids, ids, b.slots_at, ahead=number == 1))
            if turn % 7 == 0:
                b.pool.wait(tickets[-1])
        for ticket in tickets:
            b.pool.wait(ticket)
        np.testing.assert_array_equal(b.bundles()[:420], layers[0][:420].view(np.uint16))
        assert b.pool.counters()["bytes"] == b.pool.bytes_requested


@pytest.mark.parametrize("ring", ["fresh", "wrapped"])
def test_a_killed_loader_is_told_at_once(neurons, ring: str) -> None:
    with bench(neurons[0]) as b:
        for _ in range(300 if ring == "wrapped" else 1):
            b.scatter(0, range(100), range(100))
        killed = b.pool.process_ids[1]
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RunError, match=rf"loader process {killed} ended unexpectedly \(exit code -9\)"):
            for _ in range(10):
                b.scatter(0, range(500), range(500))
        assert time.monotonic() - began < 5


def test_a_loader_killed_while_it_reads_is_told_at_once(neurons) -> None:
    with bench(neurons[0], loaders=1) as b:
        b.scatter(0, [0], [0])
        os.kill(b.pool.process_ids[0], signal.SIGSTOP)  # so that the request is surely under way
        ticket = b.pool.scatter(0, np.arange(500), np.arange(500), b.slots_at)
        assert not b.pool.finished(ticket)
        os.kill(b.pool.process_ids[0], signal.SIGKILL)
        with pytest.raises(RunError, match="ended unexpectedly"):
            b.pool.wait(ticket)


def test_a_stopped_loader_cannot_hold_up_closing(neurons) -> None:
    with bench(neurons[0]) as b:
        b.scatter(0, [0], [0])
        for process in b.pool.process_ids:
            os.kill(process, signal.SIGSTOP)
        began = time.monotonic()
        b.pool.close()
        assert time.monotonic() - began < 6


def test_a_loader_that_nothing_ends_cannot_hold_up_closing(neurons, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a disk hangs: a process that waits for its reads to come back is not even killed before."""
    monkeypatch.setattr(loader_pool, "_LEAVE_S", 0.2)
    with bench(neurons[0], loaders=1) as b:
        b.scatter(0, [0], [0])
        process, killed = b.pool._peers[0].process, []
        process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(subprocess.Popen, "kill", lambda self: killed.append(self.pid))
        b.pool.close()
        assert killed == [process.pid]
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)


def test_only_a_disk_that_gives_nothing_counts_as_hanging(neurons, monkeypatch: pytest.MonkeyPatch) -> None:
    with bench(neurons[0], loaders=1) as b, ThreadPoolExecutor(1) as engine:
        b.scatter(0, [0], [0])  # it has started, which may take seconds
        monkeypatch.setattr(loader_pool, "_STALL_S", 0.1)  # it is looked at once a second
        os.kill(b.pool.process_ids[0], signal.SIGSTOP)
        waiting = engine.submit(b.pool.wait, b.pool.scatter(0, np.arange(500), np.arange(500), b.slots_at))
        deadline = time.monotonic() + 3.5
        while time.monotonic() < deadline:  # as if single reads of the request came back
            b.count_read()
            time.sleep(0.05)
        assert not waiting.done()
        with pytest.raises(RunError, match="a read has not finished for 0 s: the disk or a loader process hangs"):
            waiting.result(20)


def test_a_signal_for_the_whole_group_ends_no_loader(neurons) -> None:
    with bench(neurons[0], loaders=2) as b:
        b.scatter(0, range(500), range(500))  # they have started
        for process in b.pool.process_ids:
            os.kill(process, signal.SIGTERM)
            os.kill(process, signal.SIGINT)
        b.scatter(1, range(500), range(500))


def test_closing_twice_is_closing_once(neurons) -> None:
    gc.collect()  # what other tests left to it
    descriptors = sorted(os.listdir("/proc/self/fd"))
    with bench(neurons[0]) as b:
        b.scatter(0, [0], [0])
        processes = b.pool.process_ids
        b.pool.close()
        b.pool.close()
        assert b.pool.process_ids == []
    assert not any(Path("/proc", str(process)).exists() for process in processes)
    del b
    assert sorted(os.listdir("/proc/self/fd")) == descriptors


def test_a_loader_that_cannot_start_is_told(neurons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with bench(neurons[0]) as b, pytest.raises(RunError, match=r"ended unexpectedly \(exit code 1\)"):
        b.scatter(0, [0], [0])


def test_a_loader_that_cannot_even_be_made_leaves_nothing(neurons, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SlabPlan()
    regions, slab = LoaderPool.reserve(plan, 2, 500), Slab(plan.num_bytes)
    gc.collect()
    descriptors = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(sys, "executable", "/no/such/interpreter")
    with pytest.raises(FileNotFoundError, match="/no/such/interpreter"):
        LoaderPool(neurons[0], slab, regions, depth=2)
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    slab.close()


def test_errors_arrive_with_their_type_and_the_loaders_traceback(tmp_path: Path) -> None:
    store, _ = write_neurons(tmp_path / "store", dtype="bfloat16", d_model=256, d_ff=500)
    shard = store.path / bundles_path(1) / "c/0/0/0"
    with bench(store) as b:
        shard.unlink()
        with pytest.raises(InflashError, match=rf"{shard}: the shard is missing") as caught:
            b.scatter(1, [3], [3])
    assert type(caught.value) is InflashError
    (note,) = caught.value.__notes__
    assert note.startswith("in loader process ")
    assert "open_raw_array" in note and "Traceback" in note


def test_a_shard_cut_while_in_use_is_told(tmp_path: Path) -> None:
    store, _ = write_neurons(tmp_path / "store", dtype="bfloat16", d_model=256, d_ff=500)
    shard = store.path / bundles_path(0) / "c/0/0/0"
    with bench(store) as b:
        b.scatter(0, range(500), range(500))
        os.truncate(shard, 5000)
        with pytest.raises(RunError, match=rf"{shard}: expected \d+ bytes at \d+, found the file's end"):
            b.scatter(0, range(500), range(500))


def test_loaders_know_what_the_engine_waits_for(neurons) -> None:
    with bench(neurons[0], loaders=2) as b, ThreadPoolExecutor(1) as engine:
        for process in b.pool.process_ids:
            os.kill(process, signal.SIGSTOP)
        ticket = b.pool.scatter(0, np.arange(500), np.arange(500), b.slots_at)
        waiting, deadline = engine.submit(b.pool.wait, ticket), time.monotonic() + 20
        while b.awaited() != dict(ticket) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert b.awaited() == dict(ticket) and len(ticket) == 2
        for process in b.pool.process_ids:
            os.kill(process, signal.SIGCONT)
        waiting.result(20)


def test_a_missing_file_is_told(tmp_path: Path, neurons) -> None:
    with (
        bench(neurons[0], files=[tmp_path / "gone"]) as b,
        pytest.raises(InflashError, match="gone: cannot be opened: No such file"),
    ):
        b.pool.wait(b.pool.read_bytes(0, 0, 10, b.bytes_at))


def test_damage_is_told_when_asked_to_verify(tmp_path: Path) -> None:
    store, _ = write_neurons(tmp_path / "store", dtype="bfloat16", d_model=256, d_ff=500)
    flip_byte(store.path / bundles_path(0) / "c/0/0/0", 77 * 1024 + 5)
    with bench(store, verify=False) as b:
        b.scatter(0, range(500), range(500))
    with bench(store, verify=True) as b:
        b.scatter(0, [76, 78], [0, 1])
        with pytest.raises(InflashError, match="layer 0, neuron at position 77: expected checksum"):
            b.scatter(0, range(500), range(500))


def test_ctrl_c_does_not_reach_the_loaders(neurons) -> None:
    """The terminal sends it to the whole group; the engine alone decides."""
    with bench(neurons[0]) as b:
        b.scatter(0, range(500), range(500))
        for process in b.pool.process_ids:
            os.kill(process, signal.SIGINT)
        time.sleep(0.1)
        b.scatter(1, range(500), range(500))


def test_a_loader_is_small(neurons) -> None:
    with bench(neurons[0]) as b:
        b.scatter(0, range(500), range(500))
        for process in b.pool.process_ids:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
            assert private < 60 << 10  # KiB


def living(processes: Sequence[int]) -> list[int]:
    return [process for process in processes if Path(f"/proc/{process}/cmdline").exists() and _command(process)]


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()  # empty for a zombie that nobody has reaped
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_loaders_leave_when_their_engine_is_killed(neurons, end: signal.Signals) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from inflash.storage.store import open_store
from pipeline_bench import Bench
b = Bench(open_store(Path({str(neurons[0].path)!r})), loaders=2, depth=8)
b.scatter(0, range(500), range(500))
print(*b.pool.process_ids, flush=True)
while True:
    b.scatter(1, range(0, 500, 2), range(250))
"""
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        loaders = [int(word) for word in engine.stdout.readline().split()]
        assert living(loaders) == loaders
        engine.send_signal(end)
        engine.wait(timeout=10)
    deadline = time.monotonic() + 5
    while living(loaders) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert living(loaders) == []
    assert set(os.listdir("/dev/shm")) - before == set()
