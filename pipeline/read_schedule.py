"""The order in which a loader begins its reads.

Neurons that a step waits for come first. Guesses, which nobody waits for yet, come when there are none of those. Stretches in order
(matrices and blocks that stream through memory) come last and only a few reads at a time: they are long, are asked for far ahead, and a
neuron's read stands behind all that the disk has been given before it. A stretch that the engine itself waits for has the whole queue: no
neurons are asked for until it is there.
"""

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from ..storage.read_plan import MOST_BYTES
from ..storage.read_queue import PreparedReads, ReadQueue
from ..storage.readers import DirectFile
from .trace import SUBMIT, recorder

_LARGEST_BATCH = 64  # reads that are worth waiting for
_FEW = 2  # reads in order while neurons are asked for now and then; each is up to a MiB, and two of those keep a disk busy
BYTES_BEFORE_NEURONS = _FEW * MOST_BYTES // 2
"""That neurons stand behind, on average, where something streams by meanwhile."""
_QUIET_NS = 100_000_000  # after so long without neurons asked for, nothing has to be let past
_TAG_BITS = 32  # of a read's number in its plan
_NUMBERS = 1 << 31  # of requests that tags tell apart, far more than there are at a time


class Request:
    """One request on its way.

    Attributes:
      number: in its channel.
      reads: what it reads.
      file: that they read from.
      check: called when all reads are back; puts what was read where it belongs, if it is not there, and checks it.
      ahead: nobody waits for it yet.
      in_order: it reads a stretch rather than picked neurons.
      num_bytes: of weights that were asked for.
      submitted: reads that have begun.
      remaining: reads that are not back.
      results: [r] int64, what the kernel said of those that are.
      span: of the trace.
    """

    __slots__ = (
        "ahead",
        "check",
        "file",
        "in_order",
        "num_bytes",
        "number",
        "reads",
        "remaining",
        "results",
        "span",
        "submitted",
    )

    def __init__(
        self,
        number: int,
        reads: PreparedReads,
        file: DirectFile,
        num_bytes: int,
        check: Callable[[], None],
        *,
        ahead: bool = False,
        in_order: bool = False,
    ) -> None:
        self.number, self.reads, self.file, self.num_bytes, self.check = number, reads, file, num_bytes, check
        self.submitted, self.remaining, self.ahead = 0, len(reads.plan), ahead
        self.in_order = in_order
        self.results = np.empty(len(reads.plan), np.int64)
        self.span = 0

    @property
    def needed(self) -> bool:
        """Somebody waits for it: for neurons, as what streams by is asked for far ahead."""
        return not self.in_order and not self.ahead

    @property
    def all_begun(self) -> bool:
        return self.submitted == len(self.results)

    def complete(self) -> None:
        """Finishes reads that were cut short, and checks what was read.

        Raises:
          OSError, InflashError: a read failed, or what was read is damaged.
        """
        plan = self.reads.plan
        for read in np.flatnonzero(self.results != plan.lengths).tolist():
            self.file.finish(plan, read, int(self.results[read]))
        self.check()


def first_tag(number: int) -> int:
    """Of the reads of a request; `ReadSchedule.take_back` knows it by this."""
    return number % _NUMBERS << _TAG_BITS


class ReadSchedule:
    """Requests with reads that are not back."""

    def __init__(self, queue: ReadQueue) -> None:
        self._queue, self._trace = queue, recorder()
        self._requests: dict[int, Request] = {}  # by number as tags have it, in the order in which they came
        self._needed: deque[Request] = deque()  # these three: with reads that have not begun
        self._guessed: deque[Request] = deque()
        self._in_order: deque[Request] = deque()
        self._in_order_under_way = 0
        self._neurons_at_ns = 0  # when some were asked for, last

    def __bool__(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """A request that has something to read."""
        self._requests[request.number % _NUMBERS] = request
        queue = self._in_order if request.in_order else self._needed if request.needed else self._guessed
        queue.append(request)
        if not request.in_order:
            self._neurons_at_ns = time.perf_counter_ns()

    @property
    def between_neurons(self) -> bool:
        """Whether only stretches are being read, and neurons may be asked for any moment."""
        return all(request.in_order for request in self._requests.values()) and not self._quiet

    @property
    def _quiet(self) -> bool:
        return time.perf_counter_ns() >= self._neurons_at_ns + _QUIET_NS

    def begin(self, awaited: int = 0) -> None:
        """Gives the disk as much as it should have now; `awaited` is the request that the engine waits for."""
        self._begin_all(self._needed)
        if not any(request.needed for request in self._requests.values()):
            self._begin_all(self._guessed)
        quiet = self._quiet
        while self._in_order:
            request = self._in_order[0]
            most = self._queue.depth if quiet or request.number == awaited else _FEW
            if self._in_order_under_way >= most:
                return
            taken = self._begin(request, most - self._in_order_under_way)
            self._in_order_under_way += taken
            if request.all_begun:
                self._in_order.popleft()
            elif not taken:
                return

    def worth_waiting_for(self) -> int:
        """How many reads should be back before there is something to do.

        Few large batches cost less than many small ones, but the disk's queue must not run empty.
        """
        needed = [request for request in self._requests.values() if request.needed]
        if self._in_order and not needed:
            enough = self._in_order_under_way // 2
        else:
            first = needed[0] if needed else next(iter(self._requests.values()))
            enough = first.remaining if first.all_begun else self._queue.under_way // 2
        return max(1, min(enough, _LARGEST_BATCH))

    def take_back(self, tags: np.ndarray, results: np.ndarray) -> list[Request]:
        """Notes what reads gave, [n] int64 each; returns the requests that have all of theirs now."""
        numbers, reads, finished = tags >> _TAG_BITS, tags & ((1 << _TAG_BITS) - 1), []
        for number in sorted(set(numbers.tolist())):
            request, mine = self._requests[number], numbers == number
            request.results[reads[mine]] = results[mine]
            count = int(np.count_nonzero(mine))
            request.remaining -= count
            if request.in_order:
                self._in_order_under_way -= count
            if request.remaining == 0:
                finished.append(self._requests.pop(number))
        return finished

    def _begin_all(self, requests: deque[Request]) -> None:
        while requests:
            self._begin(requests[0], len(requests[0].results))
            if not requests[0].all_begun:
                return
            requests.popleft()

    def _begin(self, request: Request, most: int) -> int:
        with self._trace.span(SUBMIT):
            taken = self._queue.submit(request.reads, request.submitted, most)
            self._trace.tell(taken)
        request.submitted += taken
        return taken
