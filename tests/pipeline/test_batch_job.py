import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai.types import Batch

from inflash.errors import InflashError
from inflash.pipeline.batch_job import BatchJob, job_path, new_job, resumed_job

STAMPS = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "cancelling_at", "cancelled_at")


def job_of(path: Path, **changes: Any) -> BatchJob:
    known = {"endpoint": "/v1/completions", "input_sha256": "aa", "settings": {"model": "m", "ffn": "sparse"}, "total": 4}
    return replace(new_job(path.with_name("in.jsonl"), path, None), **{**known, **changes})


def document(path: Path) -> dict[str, Any]:
    return json.loads(job_path(path).read_text())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_job_s_state_is_openai_s_batch_object(path):
    job = job_of(path)
    assert not job_path(path).exists()
    for status in ("validating", "in_progress", "finalizing", "completed"):
        job = job.now(status, completed=3, failed=1)
        job.write(path)
        found = document(path)
        assert found["status"] == status
        batch = Batch.model_validate(found)
        assert batch.model_dump(exclude_unset=True) == found
    assert job_path(path).name == "out.jsonl.job.json"
    assert found["object"] == "batch"
    assert found["endpoint"] == "/v1/completions"
    assert found["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
    assert found["created_at"] <= found["in_progress_at"] <= found["finalizing_at"] <= found["completed_at"]
    assert found["input_file_id"] == str(path.with_name("in.jsonl")) and found["output_file_id"] == str(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["out.jsonl.job.json"]


def test_a_failed_check_is_told_line_by_line(path):
    new_job(Path("in.jsonl"), path, Path("err.jsonl")).now("failed", errors=[(3, "invalid_request", "no")]).write(path)
    errors = Batch.model_validate(document(path)).errors
    assert errors is not None and errors.data is not None
    assert [(error.line, error.code, error.message) for error in errors.data] == [(3, "invalid_request", "no")]


def test_an_unknown_status_is_refused(path):
    with pytest.raises(InflashError, match=r"status should be one of validating, .*'done'"):
        job_of(path).now("done")


@pytest.mark.parametrize("ending", ["cancelled", "failed", "completed"])
def test_a_resumed_job_is_the_same_one_and_forgets_how_it_ended(path, ending):
    first = job_of(path).now("in_progress").now("cancelling").now(ending, errors=[(None, "run_failed", "x")])
    first.write(path)
    again = resumed_job(job_of(path), path)
    assert (again.id, again.created_at, again.in_progress_at, again.total) == (
        first.id,
        first.created_at,
        first.in_progress_at,
        4,
    )
    going = again.now("in_progress")
    assert [getattr(going, stamp) for stamp in STAMPS] == [first.in_progress_at, *[None] * 5]
    assert going.errors == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"input_sha256": "bb"}, "the input file's content"),
        ({"settings": {"model": "m", "ffn": "hybrid"}}, r'ffn \(was "sparse", is "hybrid"\)'),
        ({"settings": {"model": "m"}}, r'ffn \(was "sparse", is null\)'),
        ({"settings": {"model": "m", "ffn": "sparse", "seed": 1}}, r"seed \(was null, is 1\)"),
    ],
)
def test_results_of_another_job_are_not_mixed_in(path, changes, named):
    job_of(path).write(path)
    before = job_path(path).read_bytes()
    with pytest.raises(InflashError, match=rf"was made with something else: {named}; .*--no-resume"):
        resumed_job(job_of(path, **changes), path)
    assert job_path(path).read_bytes() == before


def test_settings_are_compared_as_json_keeps_them(path):
    job_of(path, settings={"stop": ("a", "b")}).write(path)
    assert resumed_job(job_of(path, settings={"stop": ["a", "b"]}), path).total == 4


def test_an_error_file_of_another_job_is_named(path, tmp_path):
    """Nothing is wrong with the output, so nobody should be told to overwrite it."""
    with pytest.raises(InflashError, match=r"result file .*err\.jsonl holds results, but .*; choose another error file, or"):
        resumed_job(job_of(path), path, tmp_path / "err.jsonl")


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"request_counts": 3}', '{"id": 1, "settings": 3}'])
def test_results_that_nobody_knows_the_origin_of_are_not_added_to(path, content):
    if content is not None:
        job_path(path).write_text(content)
    with pytest.raises(InflashError, match=r"out\.jsonl\.job\.json.* cannot be read.*--no-resume"):
        resumed_job(job_of(path), path)


def test_failures_in_an_error_file_are_not_forgotten_when_it_is_left_out(path):
    errors, other = path.with_name("errors.jsonl"), path.with_name("other.jsonl")
    path.write_text("a result")
    job_of(path, error_file_id=str(errors)).now("completed").write(path)
    assert resumed_job(job_of(path), path).total == 4, "nothing had failed"
    errors.write_text("a failure")
    assert resumed_job(job_of(path, error_file_id=str(errors.parent / "." / errors.name)), path).total == 4
    for now, told in ((None, "none"), (str(other), "other.jsonl")):
        with pytest.raises(InflashError, match=rf"error-file \(was .*errors.jsonl, is .*{told}\); run as before"):
            resumed_job(job_of(path, error_file_id=now), path)
