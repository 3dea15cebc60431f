"""What a bench hears of a row in a process of its own, and that no row can hold it up."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inflash.errors import InflashError
from inflash.tools import row_process
from inflash.tools.row_process import RowProcess


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Callable[[str], RowProcess]:
    def started(program: str) -> RowProcess:
        row = RowProcess(["sh", "-c", program])
        request.addfinalizer(row.close)
        return row

    return started


def test_lines_are_answers_however_they_come(start: Callable[[str], RowProcess]) -> None:
    row = start(
        """printf '{"step": 1}\n{"step": 2}\n{"ready"'; read line; printf ': true}\n{"turn": "%s"}\n{"result": 7}\n' $line"""
    )
    row.tell("go")
    steps = []
    assert row.answer("ready", lambda: steps.append(1)) is True and len(steps) == 2
    assert (row.answer("turn"), row.answer("result")) == ("go", 7)
    assert row.memory() == {"peak_bytes": None, "limited": False}


def test_a_row_finds_modules_where_the_bench_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is installed, and the bench runs from a source tree."""
    monkeypatch.syspath_prepend(str(tmp_path))
    row = RowProcess([sys.executable, "-P", "-c", "import json, sys; print(json.dumps({'result': sys.path}))"])
    try:
        assert str(tmp_path) in row.answer("result")
    finally:
        row.close()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("""echo '{"error": "no disk"}'""", "^no disk$"),
        ("kill -9 $$", "ended by the kernel for its memory"),
        ("exit 3", "ended with 3"),
        ("exec >&-; exec sleep 60", "said nothing more and was ended"),
        ("""echo '{"step": 1}'; printf '{"res'; exec sleep 60""", "said nothing for 0 s and was ended"),
    ],
)
def test_a_row_that_does_not_answer_is_told_and_ended(
    start: Callable[[str], RowProcess], program: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_process, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(row_process, "_LEAVE_S", 0.2)
    row, began = start(program), time.monotonic()
    row.tell("to whom it may concern")
    with pytest.raises(InflashError, match=message):
        row.answer("result")
    row.close()
    assert time.monotonic() - began < 30
