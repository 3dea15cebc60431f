import threading

from inflash.errors import InflashError
from inflash.pipeline.reporter import Reporter


def test_reports_are_made_now_and_then_and_at_the_end() -> None:
    made, thrice = [], threading.Event()

    def report() -> None:
        made.append(threading.current_thread())
        if len(made) == 3:
            thrice.set()

    with Reporter([report], lambda message: None, interval_s=0.001):
        assert thrice.wait(20)
    num_made = len(made)
    assert num_made >= 3 and threading.current_thread() not in made
    with Reporter([report], lambda message: None, interval_s=3600):
        pass
    assert len(made) == num_made + 1


def test_a_report_that_fails_is_told_once_and_tried_again() -> None:
    told, tries, recovered = [], [], threading.Event()

    def failing() -> None:
        tries.append(len(tries))
        if len(tries) in (1, 2, 4):
            raise InflashError("no room")
        if len(tries) == 5:
            recovered.set()

    with Reporter([failing], told.append, interval_s=0.001):
        assert recovered.wait(20)
    assert told == ["no room", "no room"]
