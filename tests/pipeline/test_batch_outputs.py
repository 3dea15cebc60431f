"""What earlier runs have left in the files of a batch run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from inflash.errors import InflashError
from inflash.pipeline.batch_file import BatchFile
from inflash.pipeline.batch_outputs import OPEN, SUCCEEDED, UNSUCCESSFUL, BatchOutputs
from inflash.pipeline.batch_results import failed_line


def result(custom_id: str, *, succeeded: bool) -> str:
    line = failed_line(custom_id, "x", "y") | ({"response": {"status_code": 200}, "error": None} if succeeded else {})
    return json.dumps(line) + "\n"


class Asked:
    """As much of a batch as counts here: which requests it has."""

    path = Path("in.jsonl")

    def __init__(self, *custom_ids: str) -> None:
        self._ids = custom_ids

    def __len__(self) -> int:
        return len(self._ids)

    def index_of(self, custom_id: str) -> int | None:
        return self._ids.index(custom_id) if custom_id in self._ids else None


def asked(*custom_ids: str) -> BatchFile:
    return cast(Any, Asked(*custom_ids))


@pytest.fixture
def files(tmp_path: Path) -> SimpleNamespace:
    return SimpleNamespace(output=tmp_path / "out.jsonl", errors=tmp_path / "err.jsonl")


def test_a_request_that_succeeded_once_has_succeeded(files: SimpleNamespace) -> None:
    """In a first run it may have failed, into an error file that a second run was not told of."""
    files.output.write_text(result("a", succeeded=True) + result("b", succeeded=False))
    files.errors.write_text(result("a", succeeded=False))
    with BatchOutputs(files.output, files.errors) as outputs:
        assert outputs.finished(asked("a", "b", "c")).tolist() == [SUCCEEDED, UNSUCCESSFUL, OPEN]


def test_the_file_that_holds_results_is_known(files: SimpleNamespace) -> None:
    with BatchOutputs(files.output, files.errors) as outputs:
        assert outputs.fresh and outputs.held is None
    files.errors.write_text(result("a", succeeded=False))
    with BatchOutputs(files.output, files.errors) as outputs:
        assert not outputs.fresh and outputs.held == files.errors


def test_answers_to_what_nobody_asks_are_another_job_s(files: SimpleNamespace) -> None:
    files.output.write_text(result("z", succeeded=True))
    with (
        BatchOutputs(files.output, None) as outputs,
        pytest.raises(InflashError, match=r"has an answer to 'z', which in\.jsonl does not"),
    ):
        outputs.finished(asked("a"))
