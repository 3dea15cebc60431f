"""`inflash probe`: what this machine and a disk can do, for the cost model.

The disk's curve is measured with our read queue alone, and kernels at several widths among themselves. How layers stream and how their
neurons are fetched is measured with the engine's own parts, see `probe_layer`, and what a whole step takes beyond the sum of its parts with
a small model, see `probe_model`. Files of some hundred megabytes are written to the disk for that, and removed.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
BATCHES = (1, 8)
WIDTHS = (256, 1024, 2048, 4096)
"""d_model of the kernels; d_ff is four times as much."""
_TOLD = (1 << 20, 8 << 20, 64 << 20)
_BUNDLE_BYTES, _FILE_MIB = 8 << 10, 384
_CURVE_S, _KERNEL_S = 0.25, 0.1


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.device import device_path

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
    from ..pipeline.device import Device, Rate, machine_of
    from ..pipeline.machine_state import MachineState
    from .bench_io import scratch_store
    from .probe_layer import fetching, streaming
    from .probe_model import fitted, small_model
    from .probe_tiny_model import LAYERS, WIDTH, fitted_tiny
    from .yardstick import Yardstick, neuron_files

    steps = len(SIZES) * len(DEPTHS) + 7
    with progress_bar(total=steps, desc="measuring", unit=" steps") as bar:
        own = scratch_store(scratch / "neurons", _BUNDLE_BYTES, _FILE_MIB)
        store = open_store(folder) if (folder / "zarr.json").exists() else own
        files = neuron_files(store)
        yardstick = Yardstick(files, BATCHES)
        bar.update()
        kernels, pace, cached_pace = _kernels(yardstick)
        bar.update()
        curve, states = _curve(files, yardstick, bar.update)
        state = replace(MachineState.between(states), kernel_s=pace, cached_kernel_s=cached_pace)
        streamed = streaming(store, yardstick, state, BATCHES)
        bar.update()
        fetched = fetching(own, yardstick, state)
        bar.update()
        device = Device(
            state=state,
            machine=machine_of(folder),
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
            disturbed_s=dict.fromkeys(BATCHES, 0.0),
            loader_share=1.0,
            **streamed,
            **fetched,
        )
        bar.update()
        device = fitted(device, small_model(scratch / "model"), yardstick, BATCHES)
        bar.update()
        device = fitted_tiny(device, small_model(scratch / "tiny", WIDTH, LAYERS), yardstick, BATCHES)
        bar.update()
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

    curve, states = [], [yardstick.measure() for _ in range(2)]
    for size in SIZES:
        rates = []
        for number, depth in enumerate(DEPTHS):
            file, file_bytes = files[(len(curve) + number) % len(files)]
            rates.append((depth, read_rate(file, file_bytes, min(size, file_bytes), depth, _CURVE_S)))
            progress()
        states.append(yardstick.measure())
        curve += [(size, depth, rate, MachineState.between(states[-2:])) for depth, rate in rates]
    return curve, states


def _curve_in(state: Any, curve: Sequence[tuple[int, int, float, Any]]) -> tuple[Any, ...]:
    """What was measured in many states, (size, depth, rate, state), as it would be in one: points of a `Device`."""
    from ..pipeline.device import ReadPoint

    return tuple(
        ReadPoint(size=size, depth=depth, bytes_per_s=rate * state.random_bytes_per_s / then.random_bytes_per_s)
        for size, depth, rate, then in curve
    )


def _kernels(yardstick: Any) -> tuple[dict[str, Any], Any, Any]:
    """What the kernels of resident weights take at several widths, and the yardstick's products beside which the large and the small did.

    The smallest are measured among themselves: a model of that width stays in the processor's caches, too.
    """
    from ..pipeline.device import KernelTimes
    from .bench_kernels import FEW_POSITIONS, kernel_seconds

    names = {
        "attention": "short attention",
        "head": "head",
        "predictor": "predictor",
        "two predictors": "predictor and look-ahead",
    }
    names |= {"gather": "gathered_ffn", "dense": "dense_ffn"}
    wanted = (*names.values(), "attention")
    small, cached_pace = kernel_seconds(WIDTHS[:1], BATCHES, wanted, _KERNEL_S, yardstick.cached_kernels)
    large, pace = kernel_seconds(WIDTHS[1:], BATCHES, wanted, _KERNEL_S, yardstick.kernels)
    measured = small | large
    looking = {batch: _looking_back(measured, batch) for batch in BATCHES}
    found: dict[str, dict[int, Any]] = {name: {} for name in names}
    for name, kernel in names.items():
        for batch in BATCHES:
            points = [measured[kernel, width, batch] for width in WIDTHS]
            if name == "attention":
                points = [
                    _without(looking[batch], FEW_POSITIONS * batch * 8 * width, *point)
                    for width, point in zip(WIDTHS, points, strict=True)
                ]
            found[name][batch] = KernelTimes.of(points)
    return found | {"keys and values": {batch: KernelTimes.along(rate) for batch, rate in looking.items()}}, pace, cached_pace


def _looking_back(measured: Mapping[tuple[str, int, int], tuple[float, float]], batch: int) -> Any:
    """The rate at which attention takes in keys and values: by how much longer it takes over many positions than over few."""
    from ..pipeline.device import Rate

    rates = []
    for width in WIDTHS[1:]:
        (most, longer), (least, shorter) = (measured[kernel, width, batch] for kernel in ("attention", "short attention"))
        rates.append((most - least) / max(longer - shorter, 1e-9))
    return Rate(fixed_s=0.0, bytes_per_s=statistics.median(rates))


def _without(rate: Any, looked_at: float, num_bytes: float, seconds: float) -> tuple[float, float]:
    """A kernel's point less what it looked back on."""
    return num_bytes - looked_at, max(seconds - rate.seconds(looked_at), seconds / 2)


def _dram() -> dict[int, float]:
    """Bytes a second that so many threads read together from an array larger than any cache."""
    array = np.ones(48 << 20, np.uint64)
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
