"""The shared-memory rings between the engine and one loader: fixed records in, tickets and counters out.

Messages carry places and slot ids, never weights. The engine is the only writer of requests, the loader the only writer of
completions, and every word is written whole, so no lock is needed (an aligned 8-byte store is whole). A record
is written before the number that announces it; readers that look without having been woken rely on stores becoming visible in that
order, as on x86.
"""

from dataclasses import dataclass

import numpy as np

from .slab import Slab, SlabPlan

SCATTER, RANGE, BYTES, ROWS = 0, 1, 2, 3
"""Kinds of request: listed neurons to listed slots of bundles; a run of neurons to a run of rows of each part; raw bytes of a file; one
part of listed neurons to listed slots."""

MOST_PARTS = 3
RING_LENGTH = 256

REQUEST = np.dtype(
    [
        ("kind", "<u8"),
        ("source", "<u8"),  # SCATTER, RANGE, ROWS: the layer; BYTES: the number of the file
        (
            "start",
            "<u8",
        ),  # SCATTER, ROWS: first entry in the lists; RANGE: first position in the layer; BYTES: offset in the file
        ("count", "<u8"),  # SCATTER, RANGE, ROWS: neurons; BYTES: bytes
        ("slot", "<u8"),  # RANGE: first slot; ROWS: the part
        ("ahead", "<u8"),  # 1: nobody waits for it yet
        (
            "parts",
            "<u8",
            (MOST_PARTS,),
        ),  # RANGE: offset in the slab of each part's rows; SCATTER, ROWS, BYTES: of the bundles or bytes, in the first
    ]
)
COUNTERS = ("reads", "bytes", "gap_bytes", "busy_ns", "requests", "under_way")
"""`reads` came back; `bytes` are those asked for; `gap_bytes` lay between them and were read along. `busy_ns`: time with reads under way.
`under_way`: reads that are, now; the others are totals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRegion:
    """Where one loader's channel lies in the slab; `list_length` is the capacity of the lists of neurons."""

    requests: int
    positions: int
    slots: int
    done: int
    counters: int
    submitted: int
    awaited: int
    list_length: int

    @classmethod
    def reserve(cls, plan: SlabPlan, list_length: int) -> "ChannelRegion":
        return cls(
            requests=plan.reserve(RING_LENGTH * REQUEST.itemsize),
            positions=plan.reserve(list_length * 4),
            slots=plan.reserve(list_length * 4),
            done=plan.reserve(RING_LENGTH * 8),
            counters=plan.reserve(len(COUNTERS) * 8),
            submitted=plan.reserve(8),
            awaited=plan.reserve(8),
            list_length=list_length,
        )


class Channel:
    """The views of one channel, in either process.

    Attributes:
      requests: [RING_LENGTH] records; request number n (from 1) is at n % RING_LENGTH.
      positions, slots: [list_length] int32, the lists that SCATTER requests point into.
      submitted: [1] uint64, the number of the newest request.
      awaited: [1] uint64, the number of the request that the engine waits for, or did last.
      done: [RING_LENGTH] uint64; holds n at n % RING_LENGTH once request n is finished.
      counters: [6] uint64, see `COUNTERS`; since the loader began.
    """

    def __init__(self, slab: Slab, region: ChannelRegion) -> None:
        self.requests = slab.array(region.requests, (RING_LENGTH,), REQUEST)
        self.positions = slab.array(region.positions, (region.list_length,), np.int32)
        self.slots = slab.array(region.slots, (region.list_length,), np.int32)
        self.submitted = slab.array(region.submitted, (1,), np.uint64)
        self.awaited = slab.array(region.awaited, (1,), np.uint64)
        self.done = slab.array(region.done, (RING_LENGTH,), np.uint64)
        self.counters = slab.array(region.counters, (len(COUNTERS),), np.uint64)
