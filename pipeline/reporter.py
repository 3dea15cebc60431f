"""Does small things every few seconds beside a long run, in a thread of its own."""

import threading
from collections.abc import Callable, Sequence

from ..errors import InflashError


class Reporter:
    """Calls each action now and then, and once more at the end. A context manager."""

    def __init__(self, actions: Sequence[Callable[[], None]], tell: Callable[[str], None], *, interval_s: float = 5.0) -> None:
        """Prepares the reports.

        Args:
          actions: each may raise `InflashError`; it is tried again next time.
          tell: called with the message of an action that fails, once until it succeeds again.
          interval_s: between two rounds.
        """
        self._actions, self._tell, self._interval_s = actions, tell, interval_s
        self._failing: set[int] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reporter", daemon=True)

    def __enter__(self) -> "Reporter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _work(self) -> None:
        ending = False
        while not ending:
            ending = self._ending.wait(self._interval_s)
            for number, action in enumerate(self._actions):
                try:
                    action()
                    self._failing.discard(number)
                except InflashError as error:
                    if number not in self._failing:
                        self._tell(str(error))
                    self._failing.add(number)
