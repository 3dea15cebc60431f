"""What an engine promises beyond right logits: no late compilation, every byte accounted for, clear ends."""

import gc
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import zarr
from compilations import num_compilations
from decoding import teacher_forced
from opt_reference import canonical_tensors, forward
from tiny_models import BUFFERED, DIRECT, flip_byte, make_store

from inflash.errors import InflashError, RunError
from inflash.pipeline import host_memory, memory_parts, plan
from inflash.pipeline.engine import Engine
from inflash.pipeline.options import EngineOptions
from inflash.storage import resident
from inflash.storage.checkpoint import open_source
from inflash.storage.layout import bundles_path, checksums_path, neuron_order_path, resident_specs
from inflash.storage.readers import DirectFile
from inflash.storage.shard_index import open_raw_array
from inflash.storage.store import Store, open_store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

TOLERANCE = 2e-4  # float32 against float64, and up to 300 tokens


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two layers of 256 neurons; float32 rows of one sector each."""
    return make_store(tmp_path_factory.mktemp("direct"), **DIRECT)


@pytest.fixture(scope="module")
def reference(store: Store) -> Callable[[np.ndarray], np.ndarray]:
    """Token ids [T] to float64 logits [T, V]."""
    with open_source(store.path.parent / "checkpoint") as source:
        tensors = canonical_tensors(source)
    return lambda token_ids: forward(tensors, store.config, token_ids)


@pytest.fixture(scope="module")
def text(store: Store) -> np.ndarray:
    return np.random.default_rng().integers(3, store.config.vocab_size, 400).astype(np.int32)


def open_engine(store: Store, **options: Any) -> Engine:
    return Engine(store, EngineOptions(**{"predictor": "exact", "loaders": 1, "queue_depth": 2, **options}))


def descriptors() -> int:
    """How many are open; the slab's own goes with the last view of it, which a traceback may still hold."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("options", [{"ffn": "hybrid"}, {"ffn": "sparse"}], ids=["hybrid", "sparse"])
def test_prompts_of_every_length(
    store: Store, reference, text: np.ndarray, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around the sizes of chunks and pieces and of the KV cache, with layers streamed in blocks of which the last is shorter."""
    monkeypatch.setattr(plan, "BLOCK_BYTES", 100 * store.bundles.bundle_bytes)
    expected = reference(text[:300])
    with open_engine(store, **options) as engine:
        for length in (63, 300, 1, 31, 32, 33, 64, 65, 256, 257):  # the KV cache grows once: growing compiles
            np.testing.assert_allclose(engine.all_logits(text[:length]), expected[:length], rtol=0, atol=TOLERANCE)
        lengths = [300, 1, 64, 257, 33]
        engine.prepare(5, 300)
        last = np.asarray(engine.process_prompts([(row, text[:length]) for row, length in enumerate(lengths)]))
        np.testing.assert_allclose(last, expected[np.asarray(lengths) - 1], rtol=0, atol=TOLERANCE)


def test_a_prompt_does_not_depend_on_who_passes_with_it(store: Store, text: np.ndarray) -> None:
    """To the bit, and one of them reads what another writes in the same pass."""
    prompts = [text[:33], text[40:41], text[50:120], text[130:280], np.concatenate([text[130:194], text[300:326]])]
    with open_engine(store, ffn="resident") as engine:
        engine.prepare(len(prompts), 300)  # as above, so that it is compiled
        alone = []
        for row, prompt in enumerate(prompts):
            engine.kv_cache.clear()
            assert engine.kv_cache.admit(row, prompt, len(prompt))
            alone.append(np.asarray(engine.process_prompts([(row, prompt)]))[row])
        engine.kv_cache.clear()
        assert all(engine.kv_cache.admit(row, prompt, len(prompt)) for row, prompt in enumerate(prompts))
        assert engine.kv_cache.num_cached == [0, 0, 0, 0, 64]
        np.testing.assert_array_equal(np.asarray(engine.process_prompts(list(enumerate(prompts)))), alone)


def test_naive_streams_a_large_vocabulary_from_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head in several blocks, tensors cut into several checkpoints, and borders of both that do not meet."""
    monkeypatch.setattr(resident.pieces, "__defaults__", (70_000,))
    store = make_store(tmp_path, **DIRECT, vocab_size=1000, predictor_rank=0)
    assert len(resident.byte_ranges(store.resident_folder(None), resident_specs(store.config, None, store.dtype), "tokens")) > 5
    with open_source(tmp_path / "checkpoint") as source:
        tensors = canonical_tensors(source)
    texts = [np.random.default_rng().integers(3, 1000, length).astype(np.int32) for length in (20, 12)]
    with open_engine(store, ffn="naive") as engine:
        engine.prepare(2, 64)
        for found, whole in zip(teacher_forced(engine, texts, [9, 3]), texts, strict=True):
            expected = forward(tensors, store.config, whole)[len(whole) - len(found) :]
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(engine.all_logits(texts[0]), forward(tensors, store.config, texts[0]), rtol=0, atol=TOLERANCE)


def test_sequences_grow_past_every_bound(store: Store, reference, text: np.ndarray) -> None:
    """Decoding across the sizes that attention is compiled for, beside a sequence that ended long before."""
    texts, prompts = [text[:140], text[200:210], text[300:302]], [60, 3, 1]
    with open_engine(store, ffn="sparse", cache_neurons=0.5) as engine:
        engine.prepare(3, 140)
        for found, whole, prompt in zip(teacher_forced(engine, texts, prompts), texts, prompts, strict=True):
            np.testing.assert_allclose(found, reference(whole)[prompt - 1 :], rtol=0, atol=TOLERANCE)


CACHES: list[dict[str, Any]] = [
    {"cache_neurons": 1.0},
    {"cache_neurons": 0.25},
    {"cache_neurons": 37},  # fewer than a token needs: several turns
    {"cache_neurons": 3},
    {"policy": "window", "window": 4, "cache_neurons": 0.5},
    {"policy": "window", "window": 1, "cache_neurons": 9},
    {"cache_neurons": 0.25, "loaders": 3, "queue_depth": 1},
    {"cache_neurons": 0.25, "verify": True},
]


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: "-".join(map(str, cache.values())))
def test_the_cache_changes_nothing_but_what_is_read(store: Store, reference, text: np.ndarray, cache: dict[str, Any]) -> None:
    texts, prompts = [text[:25], text[30:45]], [5, 1]
    with open_engine(store, ffn="sparse", path="sparse", **cache) as engine:
        engine.prepare(2, 64)
        for found, whole, prompt in zip(teacher_forced(engine, texts, prompts), texts, prompts, strict=True):
            np.testing.assert_allclose(found, reference(whole)[prompt - 1 :], rtol=0, atol=TOLERANCE)
        times = engine.times
        assert times.steps == 20
        assert times.tokens == 20 + 14
        assert times.decode_bytes == times.misses * store.bundles.bundle_bytes
        if cache["cache_neurons"] == 1.0:  # nothing is ever read twice
            assert times.misses <= 2 * 256
            assert times.hits > times.misses


def test_neurons_may_lie_in_any_order(store: Store, reference, text: np.ndarray, tmp_path: Path) -> None:
    """A store reordered by co-activation has the same format: up_bias and predictors stay in the model's order."""
    shutil.copytree(store.path, tmp_path / "store")
    for layer in range(2):
        order = np.random.default_rng().permutation(256)
        for path in (bundles_path(layer), checksums_path(layer), neuron_order_path(layer)):
            array = zarr.open_array(str(tmp_path / "store" / path), mode="r+")
            array[:] = np.asarray(array[:])[order]
    reordered, expected = open_store(tmp_path / "store"), reference(text[:20])
    for options in (
        {"ffn": "sparse", "verify": True},
        {"ffn": "sparse", "predictor": "none"},
        {"ffn": "hybrid"},
        {"ffn": "resident"},
    ):
        with open_engine(reordered, **options) as engine:
            np.testing.assert_allclose(engine.all_logits(text[:20]), expected, rtol=0, atol=TOLERANCE)
    with open_engine(store, predictor="svd") as before, open_engine(reordered, predictor="svd") as after:
        np.testing.assert_allclose(after.all_logits(text[:20]), before.all_logits(text[:20]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [{"ffn": "sparse"}, {"ffn": "sparse", "predictor": "svd"}, {"ffn": "hybrid"}, {"ffn": "naive"}, {"ffn": "resident"}],
    ids=["exact", "svd", "hybrid", "naive", "resident"],
)
def test_nothing_is_compiled_after_warm_up(store: Store, text: np.ndarray, options: dict[str, Any]) -> None:
    if options == {"ffn": "sparse"}:
        jax.clear_caches()  # of what other tests have compiled
    with open_engine(store, **options) as engine:
        before = num_compilations()
        engine.prepare(3, 140)
        prepared = num_compilations()
        teacher_forced(engine, [text[:100], text[:40], text[:140]], [66, 33, 127])
        engine.process_prompts([(1, text[:5])])
        teacher_forced(engine, [text[50:60], text[:3], text[9:12]], [1, 2, 3])
        assert num_compilations() == prepared
    if options == {"ffn": "sparse"}:
        assert prepared > before  # the count does count


def settled(engine: Engine) -> dict[str, int]:
    """The loaders' counters once nothing is under way: streams read ahead of what was used."""
    deadline = time.monotonic() + 10
    while (counters := engine.pool.counters())["bytes"] != engine.pool.bytes_requested and time.monotonic() < deadline:
        time.sleep(0.01)
    return counters


def bytes_from_disk(engine: Engine) -> int:
    total = 0
    for process in engine.pool.process_ids:
        lines = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
        total += int(lines["read_bytes"])
    return total


def refuses_direct(store: Store) -> bool:
    file = DirectFile(store.path / bundles_path(0) / "c/0/0/0")
    try:
        return not file.can_read_directly(512, 0, 0)
    finally:
        file.close()


@pytest.mark.parametrize(
    "options", [{"ffn": "sparse", "cache_neurons": 40}, {"ffn": "sparse", "predictor": "svd"}, {"ffn": "hybrid"}]
)
def test_every_byte_is_accounted_for(store: Store, text: np.ndarray, options: dict[str, Any]) -> None:
    """What the engine asked for, what loaders say that they read, and what the kernel says that they read."""
    if refuses_direct(store):
        pytest.skip(f"the file system under {store.path} refuses direct I/O, so the kernel counts other things")
    with open_engine(store, **options) as engine:
        engine.prepare(2, 64)
        teacher_forced(engine, [text[:30], text[:20]], [10, 5])  # opens files and tries direct I/O out in every loader
        counted, from_disk, requested = settled(engine)["bytes"], bytes_from_disk(engine), engine.pool.bytes_requested
        gaps = engine.pool.counters()["gap_bytes"]
        teacher_forced(engine, [text[100:150], text[200:260]], [20, 30])
        counted = settled(engine)["bytes"] - counted
        requested = engine.pool.bytes_requested - requested
        assert requested > 20 * store.bundles.bundle_bytes
        assert counted == requested
        assert bytes_from_disk(engine) - from_disk == requested + settled(engine)["gap_bytes"] - gaps
        assert engine.times.prompt_bytes + engine.times.decode_bytes <= engine.pool.bytes_requested


def test_times_add_up(store: Store, text: np.ndarray) -> None:
    with open_engine(store, ffn="sparse") as engine:
        engine.prepare(2, 64)
        began = time.perf_counter_ns()
        teacher_forced(engine, [text[:30], text[:20]], [10, 5])
        wall = time.perf_counter_ns() - began
        times, summary = engine.times, engine.times.summary()
        assert times.prompt_tokens == 15
        assert times.prompt_bytes == 2 * store.bundles.layer_bytes
        assert times.total_ns == times.prompt_ns + times.decode_ns <= wall
        assert 0 < times.io_wait_ns + times.memory_ns < times.decode_ns
        assert summary["io_wait_ms"] + summary["memory_ms"] + summary["compute_ms"] == pytest.approx(summary["total_ms"])
        assert summary["tokens_per_s"] == pytest.approx(35 / (times.decode_ns / 1e9))
        assert summary["cache_hit_rate"] == times.hits / (times.hits + times.misses)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 20)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("mode", ["resident", "sparse", "hybrid", "naive"])
def test_a_run_that_does_not_fit_is_refused_with_the_figures(store: Store, mode: str) -> None:
    before = descriptors()
    with pytest.raises(
        InflashError, match=r"memory: this run needs \d+ MiB \(.*program \d+.*\), found 1 MiB available; use"
    ) as error:
        open_engine(store, ffn=mode)
    assert not isinstance(error.value, RunError)  # exit code 2: nothing was started
    del error
    assert descriptors() == before


def test_a_kv_cache_that_does_not_fit_is_refused_and_the_engine_stays_usable(store: Store, reference, text: np.ndarray) -> None:
    with open_engine(store, ffn="hybrid") as engine:
        engine.prepare(2, 64)
        with pytest.raises(InflashError, match=r"memory: .*KV cache of \d+ tokens .*use a smaller --max-num-seqs"):
            engine.prepare(1 << 26, 512)
        engine.prepare(2, 64)
        found, _ = teacher_forced(engine, [text[:8], text[:6]], [4, 4])
        np.testing.assert_allclose(found, reference(text[:8])[3:], rtol=0, atol=TOLERANCE)


def test_a_kv_cache_that_memory_has_made_smaller_serves_equal_runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(store, ffn="resident") as engine:
        room = memory_parts.kv_cache_bytes(store, 128)
        monkeypatch.setattr(memory_parts, "available_bytes", lambda: room - engine.kv_cache.num_bytes)
        started_over = list[int]()
        monkeypatch.setattr(engine, "_warm_up", lambda **_: started_over.append(engine.kv_cache.num_positions))
        for num_positions in (256, 256, 100):
            engine.prepare(4, 64, num_positions)
        assert started_over == [128]
        engine.prepare(4, 64)  # room for all at their longest, which is not to be had by halves
        assert started_over == [128, 256]


def test_longer_than_the_models_positions_is_refused(store: Store) -> None:
    with open_engine(store, ffn="hybrid") as engine, pytest.raises(InflashError, match="the model has 512 positions, found 513"):
        engine.prepare(1, 513)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "oracle"}, "predictor should be one of auto, exact, none, svd; found 'oracle'"),
        ({"ffn": "dense"}, "ffn should be one of sparse, hybrid, naive, resident, found 'dense'"),
        ({"cache_neurons": 0}, "cache_neurons should be"),
        ({"policy": "window"}, "window should be a number of tokens"),
        ({"window": 4}, "window=4 needs policy 'window'"),
    ],
)
def test_options_that_do_not_fit(store: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InflashError, match=message):
        open_engine(store, **options)


@pytest.mark.parametrize("damage", ["missing", "torn"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_damaged_store_is_told_and_nothing_is_left(store: Store, tmp_path: Path, layer: int, damage: str) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    shard = tmp_path / "store" / bundles_path(layer) / "c/0/0/0"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-3])
    before = descriptors()
    with pytest.raises(InflashError, match=f"{shard}: the shard"):
        open_engine(open_store(tmp_path / "store"), ffn="resident")
    assert descriptors() == before


def test_a_flipped_byte_is_found_by_a_run_that_verifies(store: Store, text: np.ndarray, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    flip_byte(tmp_path / "store" / bundles_path(1) / "c/0/0/0", 200 * store.bundles.bundle_bytes + 11)
    damaged = open_store(tmp_path / "store")
    with (
        open_engine(damaged, predictor="none", verify=True) as engine,
        pytest.raises(InflashError, match="layer 1, neuron at position 200: expected checksum"),
    ):
        engine.prepare(1, 64)
        engine.process_prompts([(0, text[:5])])


@pytest.mark.parametrize("tensor", ["resident/layer_0/0/attention_out", "predictors/svd/layer_1/0/first"])
def test_a_flipped_byte_of_what_stays_in_memory_is_found_before_the_run(store: Store, tmp_path: Path, tensor: str) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    array = open_raw_array(tmp_path / "store" / tensor)
    flip_byte(array.file, int(array.row_offsets[-1]))
    with pytest.raises(InflashError, match=f"{tensor}: expected checksum"):
        open_engine(open_store(tmp_path / "store"), predictor="svd", verify=True)


@pytest.fixture
def running(store: Store) -> Iterator[Engine]:
    with open_engine(store, ffn="sparse", cache_neurons=40) as engine:
        engine.prepare(2, 64)
        yield engine


def test_a_loader_killed_while_decoding_ends_the_run(running: Engine, text: np.ndarray) -> None:
    teacher_forced(running, [text[:10], text[:8]], [5, 5])
    killed = running.pool.process_ids[0]
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RunError, match=rf"loader process {killed} ended unexpectedly \(exit code -9\)"):
        teacher_forced(running, [text[:60], text[:60]], [1, 1])
    assert time.monotonic() - began < 5


def test_closing_twice_leaves_nothing(store: Store) -> None:
    engine = open_engine(store, ffn="hybrid")
    processes = engine.pool.process_ids
    engine.close()
    engine.close()
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def mapped_slabs() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "inflash-slab" in line]


@pytest.mark.parametrize("options", [{"ffn": "sparse", "cache_neurons": 40}, {"ffn": "naive"}], ids=["sparse", "naive"])
def test_the_slab_goes_with_its_engine(store: Store, text: np.ndarray, options: dict[str, Any]) -> None:
    """At once, not with the next garbage collection: the engine that comes after it is planned for that memory."""
    gc.collect()
    before = mapped_slabs()
    gc.disable()
    try:
        with open_engine(store, **options) as engine:
            engine.prepare(2, 64)
            teacher_forced(engine, [text[:6], text[:5]], [3, 4])
            assert len(mapped_slabs()) > len(before)
        del engine
        jax.device_put(np.zeros(1))  # jax lets go of what it was lent when it is called the next time, as any engine does
        assert mapped_slabs() == before
    finally:
        gc.enable()


def test_memory_is_named_by_its_purpose(running: Engine, store: Store) -> None:
    found = running.memory_bytes()
    assert found["neurons"] == 2 * 40 * store.bundles.bundle_bytes
    assert found["KV cache"] == 2 * 2 * 2 * 64 * 128 * 4  # keys and values, layers, sequences, positions, width, bytes
    assert found["slab"] >= found["neurons"]
