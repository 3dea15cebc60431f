"""How near the kernels come to this machine's memory: `inflash bench kernels`.

A token reads every weight that it uses once and does two operations with it, so on any machine that can multiply faster than it can
read, decoding takes bytes / bandwidth. The floor is measured in the same run, as the best of a few plain sums over an array much larger
than any cache. Each kernel's bytes are those of its weights (and of the KV positions that it looks at), however large the batch.

Every round times every kernel once, so that other work on the machine disturbs all of them alike and each finds cold caches: not of weights
alone, but of the code that starts a kernel, too. `nothing` is a call with next to no work: what any call costs before its first byte.
Where native kernels are built and not refused, each kernel is measured in both forms in the same rounds. Native kernels do not read the
down rows of silent neurons; here all neurons are active, so that every byte that is counted is read.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from ..errors import InflashError
from ..kernels.compilation import jit
from ..pipeline import native_library
from .kernel_cases import Call, Case, Weights, compile_all, kernel_cases, timed_rounds
from .table import table

BATCHES = (1, 2, 4, 8)
FLOOR_BYTES = 256 << 20
SIZES = ("d_model", "d_ff", "vocab")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """One line of the table: bytes of weights read a second, and as a share of the memory's own rate."""

    name: str
    batch: int
    gb_per_s: float
    share: float
    ms: float


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table and, as the last line, one JSON document.

    Args:
      arguments: `d_model`, `d_ff`, `vocab`, and `seconds`, the length of each measurement.

    Raises:
      InflashError: a size or the time is not positive.
    """
    for name in (*SIZES, "seconds"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise InflashError(f"bench kernels: {name} should be a positive number, found {getattr(arguments, name)}")
    weights = Weights(arguments.d_model, arguments.d_ff, arguments.vocab)
    floors = _floor_cases()
    cases = [case for batch in BATCHES for case in kernel_cases(weights, batch)]
    if native_library.choose():  # after all the others, so that they do not find each other's weights in a cache
        cases += [replace(case, name=f"{case.name} native", native=True) for case in cases if case.num_bytes]
    times = _interleaved([case.prepare(case) for case in floors + cases], arguments.seconds)
    rates = [case.num_bytes / seconds / 1e9 for case, seconds in zip(floors + cases, times, strict=True)]
    bandwidth = max(rates[: len(floors)])
    results = [
        KernelResult(name=case.name, batch=case.batch, gb_per_s=rate, share=rate / bandwidth, ms=1e3 * seconds)
        for case, rate, seconds in zip(cases, rates[len(floors) :], times[len(floors) :], strict=True)
    ]
    _report(arguments, bandwidth, results)
    return 0


def _report(arguments: argparse.Namespace, bandwidth: float, results: list[KernelResult]) -> None:
    print(f"Memory reads {bandwidth:.1f} GB/s. Weights are bf16, d_model {arguments.d_model}, d_ff {arguments.d_ff}.\n")
    ordered = sorted(results, key=lambda result: (result.name, result.batch))
    rows = [[r.name, r.batch, f"{r.gb_per_s:.1f}", f"{100 * r.share:.0f}%", f"{r.ms:.2f}"] for r in ordered]
    print(table(["kernel", "batch", "GB/s", "of memory", "ms"], rows), end="\n\n")
    document = {
        "bandwidth_gb_per_s": round(bandwidth, 3),
        **{name: getattr(arguments, name) for name in SIZES},
        "kernels": [
            {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(result).items()}
            for result in results
        ],
    }
    print(json.dumps(document))


def _floor_cases() -> list[Case]:
    """Plain sums over one large array, in the two ways that XLA runs fastest."""
    array = jnp.ones((FLOOR_BYTES // 4 // 4096, 4096), jnp.float32)
    sums = (jit(jnp.sum), jit(partial(jnp.sum, axis=1)))
    return [
        Case(name="floor", batch=0, num_bytes=array.nbytes, prepare=lambda _, each=each: partial(each, array)) for each in sums
    ]


def _interleaved(calls: list[Call], seconds: float) -> list[float]:
    """The median seconds of each call, over rounds in which every call is made once, `seconds` for each call in all."""
    compile_all(calls)
    return [float(np.median(times)) for times in zip(*timed_rounds(calls, seconds), strict=True)]
