"""`inflash probe`: what this machine and a disk can do, for the cost model.

The disk's curve is measured with our read queue alone, and kernels at several widths among themselves. How layers stream and how their
neurons are fetched is measured with the engine's own parts, see `probe_layer`, and what a whole step takes beyond the sum of its parts with
a small model and a tiny one, see `probe_model` and `probe_tiny_model`. Files of some hundred megabytes are written to the disk for that,
and removed.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InflashError
from ..storage.read_rate import read_rate
from ..storage.store import open_store
from .progress import progress_bar
from .table import table

SIZES = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 128 << 10, 1 << 20)
DEPTHS = (1, 16, 128)
WIDTHS = {1: (256, 2048, 4096), 8: (256, 2048)}
"""d_model of the kernels, by batch; d_ff is four times as much. The third is for those whose time is not a line in their bytes, and with
eight sequences, who compute more than they read, all are lines."""
BATCHES = tuple(WIDTHS)
_TOLD = (1 << 20, 8 << 20, 64 << 20)
_BUNDLE_BYTES, _FILE_MIB, _FEW_MIB = 8 << 10, 384, 64
_CURVE_S, _KERNEL_S = 0.12, 0.08
_LEFT_ALONE, _TRIES = 0.7, 3  # of the rate of fewer or smaller reads; how often a point below that is measured again


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.device_file import device_path

    folder: Path = arguments.folder
    if not folder.is_dir():
        raise InflashError(f"{folder}: expected a folder on the disk to measure")
    disk = folder.parent if (folder / "zarr.json").exists() else folder
    with tempfile.TemporaryDirectory(prefix=".inflash-probe-", dir=disk) as scratch:
        device = measure(Path(scratch), folder)
    document = device.to_json()
    file = arguments.output or device_path(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InflashError(f"{file}: cannot be written: {error.strerror}") from error
    if arguments.json:
        print(json.dumps(document))
    else:
        _report(device, file)
    return 0


def measure(scratch: Path, folder: Path) -> Any:
    """A `Device` for the disk of `folder`, measured with files in `scratch` on the same disk."""
    with progress_bar(total=len(SIZES) * len(DEPTHS) + 7, desc="measuring", unit=" steps") as bar, ExitStack() as opened:
        return _Probe(scratch, folder, opened).measure(bar.update)


class _Probe:
    """What is measured, written and compiled: kernels, the small model and the tiny one side by side."""

    def __init__(self, scratch: Path, folder: Path, opened: ExitStack) -> None:
        from .bench_io import scratch_store
        from .probe_kernels import ProbedKernels
        from .probe_model import SmallModel
        from .tiny_model import TinyModel
        from .yardstick import Yardstick, neuron_files

        with ThreadPoolExecutor(3) as beside:
            compiling = beside.submit(ProbedKernels, WIDTHS)
            making = beside.submit(lambda: opened.enter_context(TinyModel(scratch / "tiny", BATCHES)))
            given = (folder / "zarr.json").exists()  # then the other is only for neurons of a known size
            self.folder, self.own = folder, scratch_store(scratch / "neurons", _BUNDLE_BYTES, _FEW_MIB if given else _FILE_MIB)
            self.store = open_store(folder) if given else self.own
            self.files = neuron_files(self.store)
            settling = beside.submit(Yardstick, self.files, BATCHES)
            self.small = opened.enter_context(SmallModel(scratch / "model", BATCHES))
            self.kernels, self.tiny, self.yardstick = compiling.result(), making.result(), settling.result()

    def measure(self, progress: Callable[[], object]) -> Any:
        """The `Device`."""
        from ..pipeline.device import Device, Rate
        from ..pipeline.device_file import machine_of
        from ..pipeline.machine_state import MachineState
        from .probe_layer import fetching, streaming
        from .probe_tiny_model import fitted_to_steps

        progress()
        kernels, pace = self.kernels.measure(_KERNEL_S, self.yardstick.kernels)
        progress()
        curve, states = _curve(self.files, self.yardstick, progress)
        state = replace(MachineState.between(states), kernel_s=pace)
        streamed = streaming(self.store, self.yardstick, state, BATCHES)
        progress()
        fetched = fetching(self.own, self.yardstick, state)
        progress()
        device = Device(
            state=state,
            machine=machine_of(self.folder),
            cores=len(os.sched_getaffinity(0)),
            cache_bytes=_cache_bytes(),
            read_curve=_curve_in(state, curve),
            dram_bytes_per_s=_dram(),
            kernels=kernels | {"block": streamed.pop("block")},
            placing=Rate(fixed_s=0.0, bytes_per_s=1e12),
            asking=Rate(fixed_s=0.0, bytes_per_s=1e12),
            cached_share=dict.fromkeys(BATCHES, 1.0),
            item_s=dict.fromkeys(BATCHES, 0.0),
            layer_s=dict.fromkeys(BATCHES, 0.0),
            delayed_s=dict.fromkeys(BATCHES, 0.0),
            loader_share=1.0,
            **streamed,
            **fetched,
        )
        progress()
        device = self.small.fitted(device, self.yardstick)
        progress()
        device = fitted_to_steps(self.tiny, device)
        progress()
        return device


def _cache_bytes() -> int:
    """Of the first processor's largest cache, as Linux says; 0 where it does not."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=0)


def _curve(
    files: Sequence[tuple[Path, int]], yardstick: Any, progress: Callable[[], object]
) -> tuple[list[tuple[int, int, float, Any]], list[Any]]:
    """Random reads: size, how many under way, bytes a second and the machine's state then; and all states that were seen."""
    from ..pipeline.machine_state import MachineState

    disk = ("processor_s", "random_bytes_per_s", "stream_bytes_per_s")
    curve, states = [], [yardstick.measure(*disk)]

    def measured(number: int, size: int, depth: int) -> tuple[int, int, float, int]:
        file, file_bytes = files[number % len(files)]
        return size, depth, read_rate(file, file_bytes, min(size, file_bytes), depth, _CURVE_S), len(states)

    for turn, size in enumerate(SIZES):
        for depth in DEPTHS:
            curve.append(measured(len(curve), size, depth))
            progress()
        if turn % 2 or size == SIZES[-1]:
            states.append(yardstick.measure(*disk))
    for _ in range(_TRIES):
        if not (disturbed := _disturbed(curve)):
            break
        for number in disturbed:
            size, depth, *_ = curve[number]
            curve[number] = max(curve[number], measured(number, size, depth), key=lambda point: point[2])
        states.append(yardstick.measure(*disk))
    return [(*point, MachineState.between(states[at - 1 : at + 1])) for *point, at in curve], states


def _disturbed(curve: Sequence[tuple[int, int, float, int]]) -> list[int]:
    """The places of points (size, depth, rate, state) that no disk left alone has: larger reads, and more of them, get no less."""
    return [
        number
        for number, (size, depth, rate, _) in enumerate(curve)
        if any(rate < _LEFT_ALONE * other for least, few, other, _ in curve if least <= size and few <= depth)
    ]


def _curve_in(state: Any, curve: Sequence[tuple[int, int, float, Any]]) -> tuple[Any, ...]:
    """What was measured in many states, (size, depth, rate, state), as it would be in one: points of a `Device`."""
    from ..pipeline.device import ReadPoint

    return tuple(
        ReadPoint(size=size, depth=depth, bytes_per_s=rate * state.random_bytes_per_s / then.random_bytes_per_s)
        for size, depth, rate, then in curve
    )


def _dram() -> dict[int, float]:
    """Bytes a second that so many threads read together from an array larger than any cache."""
    array = np.ones(min(384 << 20, max(64 << 20, 4 * _cache_bytes())) // 8, np.uint64)
    rates = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        parts = np.array_split(array, threads)
        often = max(_together([lambda part=part: np.bitwise_or.reduce(part) for part in parts]) for _ in range(3))
        rates[threads] = array.nbytes * often
    return rates


def _together(calls: Sequence[Callable[[], object]]) -> float:
    """How often a second all the calls are made, in a thread each."""
    threads = [threading.Thread(target=call) for call in calls]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1 / (time.perf_counter() - began)


def _report(device: Any, file: Path) -> None:
    rates = {(point.size, point.depth): point.bytes_per_s for point in device.read_curve}
    print("Random reads past the page cache, MB/s:\n")
    rows = [[f"{size >> 10} KiB", *(f"{rates[size, depth] / 1e6:.0f}" for depth in DEPTHS)] for size in SIZES]
    print(table(["size", *(f"{depth} under way" for depth in DEPTHS)], rows), end="\n\n")
    if held_down := device.held_down():
        print(f"Note: {held_down}.\nPlans and predictions are for that; run this again once it is not.\n")
    print(
        f"Streaming through a loader: {device.stream_bytes_per_s / 1e9:.2f} GB/s. Beside kernels loaders reach {device.loader_share:.0%}"
    )
    print(f"of the disk's rate of random reads and use {1e6 * device.read_cpu_s:.0f} us of processor time for each.\n")
    lines = [
        [name, batch, *(f"{1e6 * each.seconds(size):.0f}" for size in _TOLD), f"{_TOLD[-1] / each.seconds(_TOLD[-1]) / 1e9:.1f}"]
        for name, batches in device.kernels.items()
        for batch, each in batches.items()
    ]
    print("Kernels, us of a call that reads so much, and GB/s of the largest:\n")
    print(table(["kernel", "batch", *(f"{size >> 20} MiB" for size in _TOLD), "GB/s"], lines), end="\n\n")
    memory = ", ".join(f"{rate / 1e9:.1f} GB/s with {threads} threads" for threads, rate in device.dram_bytes_per_s.items())
    print(f"Memory reads {memory}. Placing neurons takes {1e6 * device.placing.fixed_s:.0f} us and")
    print(f"{1e9 / device.placing.bytes_per_s:.0f} ns for each, asking loaders {1e6 * device.asking.fixed_s:.0f} us")
    between = ", ".join(f"{1e6 * seconds:.0f} us for {batch}" for batch, seconds in device.layer_s.items())
    print(f"and {1e9 / device.asking.bytes_per_s:.0f} ns. A layer takes more than its parts do: {between} sequences.")
    shares = ", ".join(f"{share:.0%} for {batch}" for batch, share in device.cached_share.items())
    items = ", ".join(f"{1e6 * seconds:.0f} us for {batch}" for batch, seconds in device.item_s.items())
    print(f"Where a model stays in the processor's caches kernels take less: {shares} sequences. A matrix that is streamed")
    print(f"takes more than reading it and computing do: {items}.\n\nkept in {file}")
