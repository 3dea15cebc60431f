"""The engine's side of the loaders: starting, asking, waiting, noticing when one dies, and stopping.

Axes: n neurons asked for.
"""

import contextlib
import os
import pickle
import select
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import RunError
from ..storage.store import Store
from .channel import BYTES, COUNTERS, MOST_PARTS, RANGE, RING_LENGTH, ROWS, SCATTER, Channel, ChannelRegion
from .interpreter import module_command, module_environment
from .loader import LoaderConfig
from .slab import Slab, SlabPlan
from .trace import ASK, WAIT, flow_of, recorder

_STALL_S = 60.0  # not one read for so long means that the disk, or the loader, hangs
_LEAVE_S = 2.0  # for a loader to end in
_EXIT_CODE_S = 30.0  # until a loader whose pipe has closed says how it ended
_SMALLEST_SHARE_BYTES = 32 << 10

Ticket = tuple[tuple[int, int], ...]
"""What a request is waited for by: (loader, number) pairs."""


@dataclass(slots=True)
class _Peer:
    """One loader as the engine sees it."""

    process: subprocess.Popen
    channel: Channel
    wake: int
    errors: int
    lifeline: int
    counters_at: int
    submitted: int = 0
    next_entry: int = 0


class LoaderPool:
    """Loader processes over one slab. A context manager; closing is idempotent and leaves no process.

    Attributes:
      bytes_requested: bytes of weights asked for since the pool began.
      wait_ns: nanoseconds spent waiting for loaders.
    """

    def __init__(
        self,
        store: Store,
        slab: Slab,
        regions: Sequence[ChannelRegion],
        *,
        depth: int,
        direct: bool = True,
        merge_gap: int = 0,
        files: Sequence[Path] = (),
        verify: bool = False,
        split_rows: Path | None = None,
    ) -> None:
        """Starts a loader for each region.

        Args:
          store, slab: what is read, and where to.
          regions: from `reserve`.
          depth: reads that each loader keeps under way.
          direct: whether neurons are read past the page cache here, see `NeuronRows.probe`.
          merge_gap: neurons at most so many bytes apart are read together.
          files: that `read_bytes` may name.
          verify: compare every neuron with its checksum.
          split_rows: read listed neurons from a copy whose parts lie apart, as `storage.split_rows` makes it.
        """
        self._bundle_bytes, self._num_parts = store.bundles.bundle_bytes, store.bundles.num_parts
        self._done = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._peers: list[_Peer] = []
        self._poll = select.poll()
        self._poll.register(self._done, select.POLLIN)
        self._turn = 0
        self.bytes_requested = 0
        self.wait_ns = 0
        self._trace = recorder()
        how = {
            "files": tuple(str(file.absolute()) for file in files),
            "depth": depth,
            "direct": direct,
            "merge_gap": merge_gap,
            "verify": verify,
            "split_rows": str(split_rows.absolute()) if split_rows else "",
        }
        self._split = split_rows is not None
        try:
            for region in regions:
                self._peers.append(self._start(store, slab, region, how))
                self._poll.register(self._peers[-1].errors, select.POLLIN)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def reserve(plan: SlabPlan, loaders: int, d_ff: int) -> list[ChannelRegion]:
        """Room in a slab for the channels of so many loaders; a layer's neurons can be listed four times over."""
        return [ChannelRegion.reserve(plan, 4 * d_ff) for _ in range(loaders)]

    @property
    def process_ids(self) -> list[int]:
        return [peer.process.pid for peer in self._peers]

    @property
    def counter_places(self) -> list[tuple[int, int]]:
        """Process id of each loader, and where its counters lie in the slab."""
        return [(peer.process.pid, peer.counters_at) for peer in self._peers]

    def counters(self) -> dict[str, int]:
        """Totals over all loaders, by the names in `COUNTERS`."""
        totals = sum((peer.channel.counters.astype(np.int64) for peer in self._peers), np.zeros(len(COUNTERS), np.int64))
        return dict(zip(COUNTERS, totals.tolist(), strict=True))

    def _reads_back(self) -> int:
        return sum(int(peer.channel.counters[COUNTERS.index("reads")]) for peer in self._peers)

    def scatter(self, layer: int, positions: np.ndarray, slots: np.ndarray, bundles: int, *, ahead: bool = False) -> Ticket:
        """Asks for neurons of a layer.

        Args:
          layer: theirs.
          positions: [n], ascending.
          slots: [n], where each goes.
          bundles: slab offset of the slots, [S, P, D].
          ahead: nobody will wait for them soon, so they stand back behind what was asked for before.
        """
        ticket = []
        for peer_number, first, last in self._shares(len(positions)):
            peer = self._peers[peer_number]
            start = peer.next_entry if peer.next_entry + last - first <= len(peer.channel.positions) else 0
            peer.channel.positions[start : start + last - first] = positions[first:last]
            peer.channel.slots[start : start + last - first] = slots[first:last]
            peer.next_entry = start + last - first
            if self._split:
                for part in range(self._num_parts):
                    ticket.append(self._submit(peer_number, ROWS, layer, start, last - first, part, (bundles,), ahead=ahead))
            else:
                ticket.append(self._submit(peer_number, SCATTER, layer, start, last - first, 0, (bundles,), ahead=ahead))
        self.bytes_requested += len(positions) * self._bundle_bytes
        return tuple(ticket)

    def read_range(self, layer: int, position: int, count: int, slot: int, parts: Sequence[int]) -> Ticket:
        """Asks for `count` neurons in order from `position`, into slots in order from `slot` of each part's rows."""
        self.bytes_requested += count * self._bundle_bytes
        return tuple(
            self._submit(peer_number, RANGE, layer, position + first, last - first, slot + first, parts)
            for peer_number, first, last in self._shares(count)
        )

    def read_bytes(self, file: int, offset: int, length: int, target: int) -> Ticket:
        """Asks for a stretch of a file (its number in `files`), to `target` bytes into the slab."""
        self.bytes_requested += length
        self._turn += 1
        return (self._submit(self._turn % len(self._peers), BYTES, file, offset, length, 0, (target,)),)

    def finished(self, ticket: Ticket) -> bool:
        return all(self._is_done(peer, number) for peer, number in ticket)

    def _is_done(self, peer: int, number: int) -> bool:
        return int(self._peers[peer].channel.done[number % RING_LENGTH]) >= number

    def wait(self, ticket: Ticket) -> None:
        """Returns when the request is done.

        Raises:
          Exception: whatever a loader met, with the loader's traceback as a note.
          RunError: a loader died, or not one read came back for a minute.
        """
        self._wait(ticket)
        self._trace.arrived(ticket)

    def _wait(self, ticket: Ticket) -> None:
        if not self.finished(ticket):
            began = time.perf_counter_ns()
            with self._trace.span(WAIT):
                self._wait_on(ticket)
            self.wait_ns += time.perf_counter_ns() - began

    def _wait_on(self, ticket: Ticket) -> None:
        deadline, seen = time.monotonic() + _STALL_S, self._reads_back()
        while not self.finished(ticket):
            self._say_awaited(ticket)
            events = self._poll.poll(1000)
            if any(descriptor == self._done for descriptor, _ in events):
                os.eventfd_read(self._done)
                deadline = time.monotonic() + _STALL_S
            for descriptor, _ in events:
                if descriptor != self._done:
                    self._raise_from(descriptor)
            if not events and time.monotonic() > deadline:
                before, seen, deadline = seen, self._reads_back(), time.monotonic() + _STALL_S
                if seen != before:  # a slow disk, and a long request
                    continue
                raise RunError(f"a read has not finished for {_STALL_S:.0f} s: the disk or a loader process hangs; run again")

    def _say_awaited(self, ticket: Ticket) -> None:
        """Lets each loader know of the first of its requests that is waited for."""
        for number, request in dict(part for part in reversed(ticket) if not self._is_done(*part)).items():
            peer = self._peers[number]
            if int(peer.channel.awaited[0]) != request:
                peer.channel.awaited[0] = request
                os.eventfd_write(peer.wake, 1)

    def close(self) -> None:
        """Stops the loaders: their lifelines close, they leave; one that does not within two seconds is killed.

        Where the disk hangs, not even that ends a process before its reads are back; it is left to the system then.
        """
        for peer in self._peers:
            os.close(peer.lifeline)
        deadline = time.monotonic() + _LEAVE_S
        for peer in self._peers:
            try:
                peer.process.wait(timeout=max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                peer.process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    peer.process.wait(timeout=_LEAVE_S)
            os.close(peer.errors)
            os.close(peer.wake)
        self._peers = []
        if self._done >= 0:
            os.close(self._done)
            self._done = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, store: Store, slab: Slab, region: ChannelRegion, how: dict[str, Any]) -> _Peer:
        """A loader; what it was to be given is closed again should it not start."""
        assert slab.descriptor is not None
        channel, writer = Channel(slab, region), self._trace.writer_for(len(self._peers))
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            wake = _closed_with(ours, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            lifeline_read, lifeline_write = map(_closed_with, (theirs, ours), os.pipe())
            errors_read, errors_write = map(_closed_with, (ours, theirs), os.pipe())
            config = LoaderConfig(
                store=str(store.path.absolute()),
                d_model=store.config.d_model,
                num_parts=store.bundles.num_parts,
                item_bytes=store.bundles.row_bytes // store.config.d_model,
                slab_bytes=slab.num_bytes,
                slab_large=tuple(slab.large),
                slab_descriptor=slab.descriptor,
                wake_descriptor=wake,
                done_descriptor=self._done,
                lifeline_descriptor=lifeline_read,
                error_descriptor=errors_write,
                trace_descriptor=self._trace.descriptor if writer >= 0 else None,
                trace_writer=writer,
                region=region,
                **how,
            )
            process = _spawn(config)
            ours.pop_all()
        return _Peer(
            process=process,
            channel=channel,
            wake=wake,
            errors=errors_read,
            lifeline=lifeline_write,
            counters_at=region.counters,
        )

    def _shares(self, count: int) -> list[tuple[int, int, int]]:
        """Splits `count` neurons over the loaders: (loader, first, last)."""
        most = max(1, count * self._bundle_bytes // _SMALLEST_SHARE_BYTES)
        shares = min(len(self._peers), most, count)
        bounds = [count * number // max(shares, 1) for number in range(shares + 1)]
        self._turn += 1
        return [((self._turn + number) % len(self._peers), first, last) for number, (first, last) in enumerate(pairwise(bounds))]

    def _submit(
        self, number: int, kind: int, source: int, start: int, count: int, slot: int, parts: Sequence[int], *, ahead: bool = False
    ) -> tuple[int, int]:
        peer = self._peers[number]
        ticket = peer.submitted + 1
        if ticket > RING_LENGTH:  # the record's previous user must be finished
            self._wait(((number, ticket - RING_LENGTH),))
        padded = tuple(parts) + (0,) * (MOST_PARTS - len(parts))
        began = time.perf_counter_ns()
        peer.channel.requests[ticket % RING_LENGTH] = (kind, source, start, count, slot, ahead, padded)
        peer.channel.submitted[0] = ticket
        peer.submitted = ticket
        os.eventfd_write(peer.wake, 1)
        self._trace.note(began, ASK, -1 if kind == BYTES else source, count, flow_of(number, ticket))
        return number, ticket

    def _raise_from(self, descriptor: int) -> None:
        peer = next(peer for peer in self._peers if peer.errors == descriptor)
        header = os.read(descriptor, 8)
        if len(header) < 8:
            try:
                code = peer.process.wait(timeout=_EXIT_CODE_S)
            except subprocess.TimeoutExpired:
                code = None
            raise RunError(
                f"loader process {peer.process.pid} ended unexpectedly (exit code {code}); finished results are kept, run again"
            )
        length = int.from_bytes(header, "little")
        message = b""
        while len(message) < length:
            part = os.read(descriptor, length - len(message))
            if not part:
                raise RunError(f"loader process {peer.process.pid} ended while it told of an error; run again")
            message += part
        error, text = pickle.loads(message)  # from our own child, over a private pipe
        error.add_note(f"in loader process {peer.process.pid}:\n{text}")
        raise error


def _closed_with(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _spawn(config: LoaderConfig) -> subprocess.Popen:
    """A loader's process, with the descriptors that its settings name."""
    named = (config.slab_descriptor, config.wake_descriptor, config.done_descriptor, config.lifeline_descriptor)
    inherited = (*named, config.error_descriptor, *(() if config.trace_descriptor is None else (config.trace_descriptor,)))
    return subprocess.Popen(
        module_command("pipeline.loader", config.to_json()),
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        env=module_environment(),
    )
