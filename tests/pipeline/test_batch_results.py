import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from inflash.errors import InflashError
from inflash.pipeline.batch_job import job_path, open_job
from inflash.pipeline.batch_results import (
    ResultWriter,
    drop_unsuccessful,
    failed_line,
    finished_ids,
    refused_line,
    success_line,
)
from inflash.pipeline.outputs import CompletionOutput, Logprob, RequestOutput


def an_output(num_choices: int = 1, text: str = "there was", logprobs: list[dict[int, Logprob]] | None = None) -> RequestOutput:
    choices = [
        CompletionOutput(index=index, text=text, token_ids=[4, 9], finish_reason="length", logprobs=logprobs)
        for index in range(num_choices)
    ]
    return RequestOutput(request_id="0", prompt="Once upon", prompt_token_ids=[2, 7, 8], outputs=choices)


def ok(custom_id: str) -> dict:
    return success_line(custom_id, an_output(), "m", 1_700_000_000)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_success_has_the_completion_object_s_form():
    line = success_line("req-1", an_output(2), "opt", 1_700_000_000)
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert line["id"].startswith("batch_req_")
    assert (line["custom_id"], line["error"]) == ("req-1", None)
    assert list(line["response"]) == ["status_code", "request_id", "body"]
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert body.pop("id").startswith("cmpl-")
    choice = {"text": "there was", "logprobs": None, "finish_reason": "length"}
    assert body == {
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "opt",
        "choices": [{"index": 0, **choice}, {"index": 1, **choice}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


def test_refused_and_failed_lines_say_whose_fault_it_was():
    refused = refused_line("a", "too long", param="prompt", code="context_length_exceeded")
    assert refused["error"] is None
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"] == {
        "error": {"message": "too long", "type": "invalid_request_error", "param": "prompt", "code": "context_length_exceeded"}
    }
    failed = failed_line("b", "loader_died", "loader 1 was killed")
    assert failed["response"] is None
    assert failed["error"] == {"code": "loader_died", "message": "loader 1 was killed"}
    assert len({line["id"] for line in (refused, failed, failed_line("b", "", ""))}) == 3


def test_logprobs_take_the_form_of_completions():
    places = [
        {4: Logprob(logprob=-1.5, rank=2, decoded_token="日"), 1: Logprob(logprob=-0.5, rank=1, decoded_token="a")},
        {
            9: Logprob(logprob=-math.inf, rank=90, decoded_token=" b"),
            3: Logprob(logprob=-0.1, rank=1, decoded_token="\ufffd"),
            6: Logprob(logprob=-4.0, rank=2, decoded_token="\ufffd"),
        },
    ]
    (choice,) = success_line("a", an_output(logprobs=places), "m", 0)["response"]["body"]["choices"]
    assert choice["logprobs"] == {
        "tokens": ["日", " b"],
        "token_logprobs": [-1.5, -9999.0],
        "top_logprobs": [{"日": -1.5, "a": -0.5}, {" b": -9999.0, "\ufffd": -0.1}],
        "text_offset": [0, 1],
    }


def test_logprobs_without_a_tokenizer_name_the_ids():
    places = [{4: Logprob(logprob=-1.0)}, {9: Logprob(logprob=-2.0)}]
    (choice,) = success_line("a", an_output(text="", logprobs=places), "m", 0)["response"]["body"]["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:4", "token_id:9"]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(path):
    with ResultWriter(path) as writer:
        writer.write(success_line("ü\u2028", an_output(text="a\u2028\r\nb"), "m", 0))
        lines = path.read_text().splitlines()
        assert len(lines) == 1
        assert json.loads(lines[0])["response"]["body"]["choices"][0]["text"] == "a\u2028\r\nb"
        writer.write(ok("b"))
        assert finished_ids(path) == {"ü\u2028": True, "b": True}


def test_the_disk_is_asked_at_most_once_a_second_and_at_the_end(path, monkeypatch):
    now, synced = [100.0], []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(now[0]))
    with ResultWriter(path, clock=lambda: now[0]) as writer:
        for _ in range(25):
            now[0] += 0.125
            writer.write(ok("a"))
    assert synced == [101.0, 102.0, 103.0, 103.125]


@pytest.mark.parametrize("cut", [1, 5, 18, 60, -1])
def test_a_torn_last_line_is_repaired_and_its_request_is_not_finished(path, cut):
    with ResultWriter(path) as writer:
        writer.write(ok("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(ok("b")).encode()[:cut])
    assert finished_ids(path) == {"a": True}
    with ResultWriter(path) as writer:
        assert path.read_bytes() == whole
        writer.write(ok("b"))
    assert finished_ids(path) == {"a": True, "b": True}


@pytest.mark.parametrize("content", ["precious", '{"custom_id": "a"}\n', "1\n", "[]\n", '{"id": 5, "error": null}\n', "\x00\n"])
def test_a_file_of_something_else_is_left_as_it_is(path, content):
    path.write_text(content)
    with pytest.raises(InflashError, match="line 1 is no result of a batch run"):
        finished_ids(path)
    with pytest.raises(InflashError, match="line 1 is no result of a batch run"):
        drop_unsuccessful(path)
    assert path.read_text() == content


def test_a_torn_end_of_something_else_is_not_cut_off(path):
    path.write_text("precious")
    with pytest.raises(InflashError, match="no-resume"):
        ResultWriter(path)
    assert path.read_text() == "precious"
    ResultWriter(path, resume=False).close()
    assert path.read_bytes() == b""


def test_starting_afresh_overwrites_and_resuming_appends(path):
    for custom_id in "ab":
        with ResultWriter(path) as writer:
            writer.write(ok(custom_id))
    assert list(finished_ids(path)) == ["a", "b"]
    with ResultWriter(path, resume=False) as writer:
        writer.write(ok("c"))
    assert list(finished_ids(path)) == ["c"]


def test_a_file_that_is_not_there_has_no_finished_requests(path):
    assert finished_ids(path) == {}
    drop_unsuccessful(path)
    assert not path.exists()


def test_unsuccessful_lines_can_be_dropped_for_another_try(path):
    with ResultWriter(path) as writer:
        for line in (ok("a"), refused_line("b", "too long"), failed_line("c", "x", "y"), ok("d")):
            writer.write(line)
    assert finished_ids(path) == {"a": True, "b": False, "c": False, "d": True}
    drop_unsuccessful(path)
    assert finished_ids(path) == {"a": True, "d": True}
    assert [entry.name for entry in path.parent.iterdir()] == ["out.jsonl"]


def test_two_runs_do_not_write_one_file(path):
    with ResultWriter(path) as writer:
        writer.write(ok("a"))
        for resume in (True, False):
            with pytest.raises(InflashError, match="being written by another run"):
                ResultWriter(path, resume=resume)
        with pytest.raises(InflashError, match="being written by another run"):
            drop_unsuccessful(path)
    assert finished_ids(path) == {"a": True}
    ResultWriter(path).close()


def test_closing_twice_is_harmless(path):
    writer = ResultWriter(path)
    writer.close()
    writer.close()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InflashError, match=r"none/out\.jsonl cannot be opened: No such file"):
        ResultWriter(tmp_path / "none" / "out.jsonl")


def test_when_the_disk_takes_no_more_the_file_ends_with_a_whole_line(path):
    """A limit on the file's size stands for the full disk: the write comes back short, then fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with ResultWriter(path) as writer:
        writer.write(ok("a"))
        whole = path.read_bytes()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, limits[1]))
            with pytest.raises(InflashError, match="cannot be written: File too large; finished results stay in it"):
                writer.write(ok("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.read_bytes() == whole
        writer.write(ok("c"))
    assert finished_ids(path) == {"a": True, "c": True}


def test_a_killed_run_loses_no_line_that_it_wrote(path):
    script = f"""
import os, signal
from inflash.pipeline.batch_results import ResultWriter, refused_line
writer = ResultWriter({str(path)!r})
for number in range(5):
    writer.write(refused_line(str(number), "x"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert list(finished_ids(path)) == ["0", "1", "2", "3", "4"]
    ResultWriter(path).close()  # the lock went with its process


def job_of(path: Path, **changes):
    arguments = {
        "input_sha256": "aa",
        "settings": {"model": "m", "ffn": "sparse"},
        "total": 4,
        "finished": {"a": True, "b": False},
    }
    return open_job(path, **{**arguments, **changes})


def test_a_job_s_state_has_the_batch_object_s_words(path):
    job = job_of(path, finished={})
    assert not job_path(path).exists()
    job.write(path)
    job = job.now("in_progress")
    job.now("completed", completed=3, failed=1).write(path)
    document = json.loads(job_path(path).read_text())
    assert job_path(path).name == "out.jsonl.job.json"
    assert document["object"] == "batch"
    assert document["endpoint"] == "/v1/completions"
    assert document["status"] == "completed"
    assert document["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
    assert document["created_at"] <= document["in_progress_at"] <= document["completed_at"]
    assert [entry.name for entry in path.parent.iterdir()] == ["out.jsonl.job.json"]


def test_an_unknown_status_is_refused(path):
    with pytest.raises(InflashError, match=r"status should be one of validating, .*'done'"):
        job_of(path, finished={}).now("done")


def test_a_resumed_job_is_the_same_one_with_the_counts_of_its_results(path):
    first = job_of(path, finished={}).now("in_progress").now("cancelled")
    first.write(path)
    again = job_of(path)
    assert (again.id, again.created_at, again.in_progress_at) == (first.id, first.created_at, first.in_progress_at)
    assert (again.completed, again.failed, again.total) == (1, 1, 4)


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
    job_of(path, finished={}).write(path)
    before = job_path(path).read_bytes()
    with pytest.raises(InflashError, match=rf"was made with something else: {named}; .*--no-resume"):
        job_of(path, **changes)
    assert job_path(path).read_bytes() == before
    assert job_of(path, **changes, finished={}).completed == 0


def test_settings_are_compared_as_json_keeps_them(path):
    job_of(path, finished={}, settings={"stop": ("a", "b")}).write(path)
    assert job_of(path, settings={"stop": ["a", "b"]}).total == 4


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"request_counts": 3}'])
def test_results_that_nobody_knows_the_origin_of_are_not_added_to(path, content):
    if content is not None:
        job_path(path).write_text(content)
    with pytest.raises(InflashError, match=r"out\.jsonl\.job\.json.* cannot be read.*--no-resume"):
        job_of(path)
