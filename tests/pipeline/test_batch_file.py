import hashlib
import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import completion_create_params as chat_schema
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter
from typing_extensions import get_type_hints

from inflash.errors import InflashError, RunError
from inflash.pipeline.batch_file import MOST_LINE_BYTES, BatchFileError, read_batch
from inflash.pipeline.batch_requests import BatchRequest
from inflash.pipeline.prompts import NEW_DOCUMENT
from inflash.pipeline.sampling_params import MAX_TOKENS, SamplingParams

GOOD = {"custom_id": "req-1", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "Once upon"}}


def with_line(**changes: Any) -> bytes:
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value is not ...}).encode()


def with_body(**changes: Any) -> bytes:
    return with_line(body={name: value for name, value in {**GOOD["body"], **changes}.items() if value is not ...})


CHAT = {"url": "/v1/chat/completions"}


def with_chat(**changes: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": "Hi"}]} | changes
    return with_line(**CHAT, body={name: value for name, value in body.items() if value is not ...})


def with_messages(*messages: Any) -> bytes:
    return with_chat(messages=list(messages))


def raw_body(text: str) -> bytes:
    return with_body(seed="@").replace(b'"@"', text.encode())


HOSTILE = {
    "cut off": (with_line()[:-5], "not JSON"),
    "two objects": (with_line() + with_line(), "not JSON: Extra data"),
    "not utf-8": (with_line().replace(b"Once", b"\xff\xfe"), r"not UTF-8: byte \d+ of the line is 0xff"),
    "utf-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00", "not UTF-8"),
    "zero byte": (b"\x00" + with_line(), "not JSON"),
    "a list": (b"[1, 2]", "expected a JSON object, found a list of 2"),
    "a string": (b'"hello"', 'expected a JSON object, found "hello"'),
    "null": (b"null", "expected a JSON object, found nothing"),
    "deep nesting": (b"[" * 100_000, "not JSON"),
    "deep body": (with_line(body="@").replace(b'"@"', b"[" * 500 + b"]" * 500), "body should be an object, found a list of 1"),
    "endless digits": (raw_body("9" * 5000), "not JSON that can be read"),
    "field twice": (b'{"custom_id": "a",' + with_line()[1:], 'fields given twice: "custom_id"'),
    "nan": (raw_body("NaN"), "NaN is no JSON number"),
    "infinity": (raw_body("-Infinity"), "-Infinity is no JSON number"),
    "overflow": (with_body(temperature="@").replace(b'"@"', b"1e999"), "temperature should be .*, found inf"),
    "no custom_id": (with_line(custom_id=...), "custom_id should be a string, not empty, found nothing"),
    "empty custom_id": (with_line(custom_id=""), "custom_id should be a string, not empty"),
    "number as custom_id": (with_line(custom_id=7), "custom_id should be a string, not empty, found 7"),
    "half a character": (with_line(custom_id="\ud800"), "custom_id holds half a character"),
    "no method": (with_line(method=...), "method should be 'POST', found nothing"),
    "get": (with_line(method="GET"), "method should be 'POST', found \"GET\""),
    "no url": (with_line(url=...), "url should be '/v1/completions'"),
    "chat without messages": (with_line(**CHAT), 'body has unknown fields "prompt"; supported are messages'),
    "embeddings": (with_line(url="/v1/embeddings"), "url should be '/v1/completions' or '/v1/chat/completions', found"),
    "list as url": (with_line(url=["/v1/completions"]), "url should be .*, found a list of 1"),
    "unknown field": (with_line(priority=1, extra=2), 'line has unknown fields "priority", "extra"; supported are custom_id'),
    "no body": (with_line(body=...), "body should be an object, found nothing"),
    "text as body": (with_line(body="x"), "body should be an object"),
    "unknown body field": (with_body(max_new_tokens=5), 'body has unknown fields "max_new_tokens"; supported are .*max_tokens'),
    "chat's limit": (with_body(max_completion_tokens=5), "unknown fields"),
    "number as model": (with_body(model=3), "model should be a string, found 3"),
    "number as user": (with_body(user=3), "user should be a string, found 3"),
    "no prompt": (with_body(prompt=...), "prompt should be a string or .*, found nothing; null begins a new document"),
    "empty list": (with_body(prompt=[]), "prompt should not be an empty list"),
    "empty list of ids": (with_body(prompt=[[5], []]), r"prompt\[1\] should not be an empty list"),
    "number as prompt": (with_body(prompt=3), "prompt should be a string or a list of token ids, found 3"),
    "very many prompts": (
        with_body(prompt=["a"] * 2049),
        "prompt should be a list of at most 2048 prompts, found 2049; make lines",
    ),
    "very many choices": (
        with_body(prompt=["a"] * 33, n=128),
        "33 prompts and n is 128; a line may have 4096 choices, make several",
    ),
    "null as the first prompt": (
        with_body(prompt=[None, "a"]),
        r"prompt\[0\] should be a string or a list of token ids, found nothing",
    ),
    "null among prompts": (
        with_body(prompt=["a", None]),
        r"prompt\[1\] should be a string or a list of token ids, found nothing",
    ),
    "negative id in a list": (with_body(prompt=[[1], [2, -1]]), r"prompt\[1\]\[1\] should be a token id .*, found -1"),
    "half a prompt in a list": (with_body(prompt=["a", "\ud800"]), r"prompt\[1\] holds half a character"),
    "prompt among ids": (with_body(prompt=[1, "a"]), r"prompt\[1\] should be a token id .*, found \"a\""),
    "negative id": (with_body(prompt=[1, -2]), r"prompt\[1\] should be a token id .*, found -2"),
    "fraction as id": (with_body(prompt=[1.0]), r"prompt\[0\] should be a token id .*, found 1.0"),
    "true as id": (with_body(prompt=[5, True]), r"prompt\[1\] should be a token id .*, found true"),
    "half a prompt": (with_body(prompt="ab\udc00"), "prompt holds half a character .* at character 3"),
    "half a stop": (with_body(stop=["\udc00"]), "stop holds half a character"),
    "negative max_tokens": (with_body(max_tokens=-4), "max_tokens should be .*, found -4"),
    "text as max_tokens": (with_body(max_tokens="16"), "max_tokens should be .*, found '16'"),
    "hot": (with_body(temperature=-1), "temperature should be"),
    "true as logprobs": (with_body(logprobs=True), "logprobs should be"),
    "many logprobs": (with_body(logprobs=1000), "logprobs should be"),
    "stream": (with_body(stream=True), "body asks for stream = true, which is not supported: .*; leave stream out"),
    "number as stream": (with_body(stream=0), "body asks for stream = 0"),
    "echo": (with_body(echo=True), "body asks for echo = true, which is not supported: join the prompt and the text yourself"),
    "best_of": (with_body(best_of=4, n=2), "body asks for best_of = 4, .*: all n continuations are returned"),
    "suffix": (with_body(suffix="end"), "body asks for suffix = .*: a text is only continued at its end"),
    "list as logit_bias": (with_body(logit_bias=[5]), "logit_bias should be biases by token ids, found"),
    "word as token": (
        with_body(logit_bias={"five": 1}),
        r"logit_bias should be biases by token ids \(integers from 0 to 2147483647, each once\), found 'five'",
    ),
    "great bias": (with_body(logit_bias={"5": -101}), "logit_bias of token 5 should be a number from -100 to 100, found -101"),
    "too long": (with_body(prompt="x" * 10_000_000), r"^.*10000\d{3} bytes long; a line may have 4194304"),
}
HOSTILE_CHATS = {
    "no messages": (with_chat(messages=...), "messages should be a list of messages, not empty, found nothing"),
    "empty messages": (with_messages(), "messages should be a list of messages, not empty, found a list of 0"),
    "text as messages": (with_chat(messages="Hi"), "messages should be a list"),
    "text as message": (with_messages("Hi"), r'messages\[0\] should be an object, found "Hi"'),
    "no role": (with_messages({"content": "Hi"}), r"messages\[0\].role should be one of system, .*, found nothing"),
    "tool": (with_messages({"role": "tool", "content": "4"}), r'messages\[0\].role should be one of .*, found "tool"'),
    "list as role": (with_messages({"role": ["user"], "content": "4"}), r"messages\[0\].role should be"),
    "no content": (
        with_messages({"role": "user"}),
        r"messages\[0\].content should be a string or a list of text parts, found nothing",
    ),
    "picture": (
        with_messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        r"messages\[0\].content\[0\] should be .*; only text is supported",
    ),
    "half a message": (with_messages({"role": "user", "content": "\ud800"}), r"messages\[0\].content holds half a character"),
    "tool calls": (with_messages({"role": "assistant", "content": "", "tool_calls": [{}]}), r"messages\[0\] has tool_calls"),
    "a user who refuses": (
        with_messages({"role": "user", "content": "", "refusal": "no"}),
        r'messages\[0\] has unknown .*"refusal"',
    ),
    "a user's refusal": (
        with_messages({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}),
        "only text is supported",
    ),
    "number as refusal": (
        with_messages({"role": "assistant", "refusal": 5}),
        r"messages\[0\].refusal should be a string, found 5",
    ),
    "a list of refusals": (
        with_messages({"role": "assistant", "content": [{"type": ["text"], "text": ""}]}),
        "only text is supported",
    ),
    "unknown message field": (with_messages({"role": "user", "content": "", "x": 1}), r'messages\[0\] has unknown fields "x"'),
    "number as name": (with_messages({"role": "user", "content": "", "name": 1}), "name should be a string"),
    "prompt in a chat": (with_chat(prompt="x"), 'body has unknown fields "prompt"'),
    "tools": (with_chat(tools=[{"type": "function"}]), "body asks for tools = a list of 1, which is not supported: no tools"),
    "json": (with_chat(response_format={"type": "json_object"}), "body asks for response_format"),
    "chat stream": (with_chat(stream=True), "body asks for stream = true, .*: results come whole"),
    "two limits": (with_chat(max_tokens=5, max_completion_tokens=6), "max_completion_tokens is 6 and max_tokens 5; give one"),
    "negative limit": (with_chat(max_completion_tokens=-1), "max_tokens should be .*, found -1"),
    "number as logprobs": (with_chat(logprobs=3), "logprobs should be true or false for /v1/chat/completions, found 3"),
    "top_logprobs alone": (with_chat(top_logprobs=3), "top_logprobs = 3 needs logprobs = true"),
    "true as top_logprobs": (with_chat(logprobs=True, top_logprobs=True), "top_logprobs should be an integer from 0 to 20"),
    "many top_logprobs": (with_chat(logprobs=True, top_logprobs=21), "top_logprobs should be an integer from 0 to 20, found 21"),
}


def write(tmp_path: Path, *lines: bytes) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read(path: Path, **defaults: Any) -> list[BatchRequest]:
    with read_batch(path, **defaults) as batch:
        return list(batch)


@pytest.mark.parametrize("name", [*HOSTILE, *HOSTILE_CHATS])
def test_a_bad_line_is_refused_with_its_number_and_reason(tmp_path, name):
    line, reason = {**HOSTILE, **HOSTILE_CHATS}[name]
    good = with_line if name in HOSTILE else with_chat
    first, last = good().replace(b"req-1", b"first"), good().replace(b"req-1", b"last")
    path = write(tmp_path, first, b"", line, last)
    with pytest.raises(
        BatchFileError, match=rf"^batch file {path}: 1 bad line, .*\n  line 3: .*{reason.removeprefix('^.*')}"
    ) as caught:
        read_batch(path)
    assert len(str(caught.value)) < 1000
    str(caught.value).encode("utf-8")
    assert [line for line, _ in caught.value.problems] == [3]


def test_all_bad_lines_are_reported_together(tmp_path):
    path = write(tmp_path, with_line(method="GET"), with_line(), b"{", with_line(), with_body(echo=True))
    with pytest.raises(InflashError, match="4 bad lines") as caught:
        read_batch(path)
    assert [text.split(":")[0].strip() for text in str(caught.value).splitlines()[1:]] == ["line 1", "line 3", "line 4", "line 5"]
    assert 'custom_id "req-1" is already that of line 2; make it unique' in str(caught.value)


def test_of_very_many_bad_lines_twenty_are_explained_and_all_are_numbered(tmp_path):
    with pytest.raises(InflashError, match="72 bad lines") as caught:
        read_batch(write(tmp_path, *[b"{"] * 70, with_line(), b"[]", with_line()))
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 52 more, lines 21-70, 72-73"


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n\t\n", b"\xef\xbb\xbf"])
def test_a_file_without_requests_is_refused(tmp_path, content):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(InflashError, match=r"in\.jsonl is empty; expected one JSON object a line"):
        read_batch(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InflashError, match=r"none\.jsonl cannot be read: No such file"):
        read_batch(tmp_path / "none.jsonl")
    with pytest.raises(InflashError, match="cannot be read: Is a directory"):
        read_batch(tmp_path)


def test_a_body_becomes_sampling_parameters(tmp_path):
    body = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": 3,
        "stop": ["\n", "END"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "max_tokens": 64,
        "min_tokens": 2,
        "logprobs": 5,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"7": -100, "9": 1.5},
    }
    (request,) = read(write(tmp_path, with_body(**body, user="someone", prompt=[5, 0, 9])))
    assert request.sampling_params == SamplingParams(**body)
    assert (request.prompts, request.model, request.custom_id, request.line) == (((5, 0, 9),), "m", "req-1", 1)


def test_defaults_are_openai_s(tmp_path):
    (request,) = read(write(tmp_path, with_body()))
    assert request.sampling_params == SamplingParams(max_tokens=16, temperature=1.0)
    assert request.prompts == ("Once upon",)


def test_request_then_command_line_then_model(tmp_path):
    path = write(tmp_path, with_body(temperature=0, top_p=None), with_body(seed=8).replace(b"req-1", b"req-2"))
    batch = read(path, command_line={"temperature": 0.3, "seed": 5}, generation_config={"top_p": 0.7, "temperature": None})
    assert [request.sampling_params for request in batch] == [
        SamplingParams(temperature=0, seed=5, top_p=0.7),
        SamplingParams(temperature=0.3, seed=8, top_p=0.7),
    ]


def test_a_fault_of_the_model_s_defaults_is_no_line_s(tmp_path):
    with pytest.raises(InflashError, match=r"^generation_config\.json: top_p"):
        read_batch(write(tmp_path, with_body()), generation_config={"top_p": 3})


def test_neutral_values_of_unsupported_fields_are_taken(tmp_path):
    neutral = {"stream": False, "stream_options": None, "echo": False, "suffix": None, "logit_bias": {}, "user": None}
    lines = [with_body(**neutral, best_of=3, n=3), with_body(best_of=1, n=None, model=...).replace(b"req-1", b"req-2")]
    first, second = read(write(tmp_path, *lines))
    assert first.sampling_params.n == 3
    assert second.model is None


def test_byte_order_mark_windows_line_ends_and_a_missing_last_newline_are_taken(tmp_path):
    path = tmp_path / "in.jsonl"
    content = (
        b"\xef\xbb\xbf" + with_line() + b"\r\n\r\n" + with_line(custom_id="日本 \u2028").replace(b"\\u2028", "\u2028".encode())
    )
    path.write_bytes(content)
    with read_batch(str(path)) as batch:
        assert [request.custom_id for request in batch] == ["req-1", "日本 \u2028"]
        assert [request.line for request in batch] == [1, 3]
        assert batch.sha256 == hashlib.sha256(content).hexdigest()


def test_a_chat_becomes_messages_and_sampling_parameters(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": None, "refusal": None},
        {"role": "assistant", "content": None},
        {"role": "assistant", "refusal": "No."},
        {"role": "assistant", "content": "", "refusal": "No."},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Well"}, {"type": "refusal", "refusal": "no"}],
            "refusal": "Sorry.",
        },
    ]
    body = {"max_completion_tokens": 5, "n": 2, "logprobs": True, "top_logprobs": 3, "stop": "x", "tools": [], "store": False}
    lines = [
        with_chat(messages=messages, **body),
        with_chat(logprobs=False).replace(b"req-1", b"req-2"),
        with_chat(logprobs=True, max_tokens=7, max_completion_tokens=7).replace(b"req-1", b"req-3"),
    ]
    first, second, third = read(write(tmp_path, *lines))
    spoken = ["", "", "No.", "No.", "Well\nno\nSorry."]
    chat = [
        messages[0],
        {"role": "user", "content": "a\nb", "name": "ann"},
        *({"role": "assistant", "content": text} for text in spoken),
    ]
    assert first.prompts == ({"messages": chat},)
    assert first.sampling_params == SamplingParams(max_tokens=5, n=2, logprobs=3, stop="x")
    assert second.sampling_params == SamplingParams(max_tokens=MAX_TOKENS)
    assert third.sampling_params == SamplingParams(max_tokens=7, logprobs=0)
    limited = read(write(tmp_path, with_chat()), generation_config={"max_new_tokens": 9})
    assert limited[0].sampling_params.max_tokens == 9


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        ([1, 2], ((1, 2),)),
        (["a", "b", ""], ("a", "b", NEW_DOCUMENT)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        ("", (NEW_DOCUMENT,)),
        (None, (NEW_DOCUMENT,)),
    ],
)
def test_a_prompt_has_every_form_that_openai_s_schema_knows(tmp_path, prompt, prompts):
    body = {"model": "m", "prompt": prompt}
    TypeAdapter(CompletionCreateParamsNonStreaming).validate_python(body)
    (request,) = read(write(tmp_path, with_line(body=body)))
    assert request.prompts == prompts


def test_bodies_that_openai_s_schema_takes_are_taken(tmp_path):
    """Whatever asks for a text; what asks for more is refused by name (HOSTILE)."""
    completion = {
        "model": "m",
        "prompt": ["a", "b"],
        "n": 128,
        "best_of": 128,
        "echo": False,
        "frequency_penalty": 0.5,
        "logprobs": 5,
        "logit_bias": {"50256": -100},
        "max_tokens": 4,
        "presence_penalty": -1,
        "seed": 7,
        "stop": ["a", "b"],
        "stream": False,
        "stream_options": None,
        "suffix": None,
        "temperature": 1.5,
        "top_p": 0,
        "user": "u",
    }
    chat = {
        "messages": [{"role": "user", "content": "Hi"}],
        "model": "m",
        "audio": None,
        "frequency_penalty": 0,
        "logit_bias": {"5": 1},
        "function_call": "none",
        "functions": [],
        "logprobs": True,
        "top_logprobs": 20,
        "max_completion_tokens": 8,
        "metadata": {},
        "max_tokens": None,
        "modalities": ["text"],
        "moderation": None,
        "n": 1,
        "parallel_tool_calls": True,
        "prediction": None,
        "presence_penalty": 0,
        "prompt_cache_key": "k",
        "prompt_cache_options": {},
        "prompt_cache_retention": "24h",
        "store": True,
        "reasoning_effort": "none",
        "response_format": {"type": "text"},
        "safety_identifier": "s",
        "seed": 1,
        "stop": "x",
        "service_tier": "flex",
        "stream": False,
        "stream_options": None,
        "temperature": 0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1,
        "user": "u",
        "verbosity": "medium",
    }
    schemas = (CompletionCreateParamsNonStreaming, chat_schema.CompletionCreateParamsNonStreaming)
    for schema, body, url in zip(schemas, (completion, chat), (GOOD["url"], CHAT["url"]), strict=True):
        assert body.keys() <= get_type_hints(schema).keys()
        TypeAdapter(schema).validate_python(body)
        (request,) = read(write(tmp_path, with_line(url=url, body=body)))
        assert request.sampling_params.biases


def test_a_file_has_one_endpoint(tmp_path):
    """As OpenAI demands it: the Batch object has one."""
    path = write(tmp_path, with_line(), with_chat().replace(b"req-1", b"req-2"))
    with pytest.raises(InflashError, match="line 2: url is '/v1/chat/completions', that of line 1 is '/v1/completions'"):
        read_batch(path)


def test_a_long_line_is_not_held_and_the_next_is_read(tmp_path):
    padding = MOST_LINE_BYTES - len(with_body(prompt="")) - 1
    longest = with_body(prompt="x" * padding)
    path = write(tmp_path, longest.replace(b"req-1", b"req-0"), longest + b" ", with_line(method="GET"))
    with pytest.raises(BatchFileError, match="2 bad lines") as caught:
        read_batch(path)
    assert [line for line, _ in caught.value.problems] == [2, 3]


def test_requests_are_found_by_their_custom_id(tmp_path):
    ids = [f"request {number}" for number in range(300)]
    with read_batch(write(tmp_path, *(with_line(custom_id=custom_id) for custom_id in ids))) as batch:
        assert [batch.index_of(custom_id) for custom_id in ids] == list(range(300))
        assert [batch.num_bytes(index) for index in range(300)] == [len(with_line(custom_id=custom_id)) + 1 for custom_id in ids]
        assert batch.index_of("request 300") is None
        assert batch.request(7).custom_id == "request 7"


def test_repeated_ids_are_counted_and_reported_in_the_file_s_order(tmp_path):
    lines = [with_line(custom_id=f"{number % 3}") for number in range(40)] + [b"{"]
    with pytest.raises(BatchFileError, match="38 bad lines") as caught:
        read_batch(write(tmp_path, *lines))
    assert [line for line, _ in caught.value.problems] == list(range(4, 24))
    assert 'line 9: custom_id "2" is already that of line 3' in str(caught.value)


def test_a_file_that_changes_while_it_is_run_ends_the_run(tmp_path):
    path = write(tmp_path, with_line(), with_line(custom_id="b"))
    with read_batch(path) as batch:
        assert batch.request(1).custom_id == "b"
        path.write_bytes(b"\n" + path.read_bytes())
        with pytest.raises(RunError, match="was changed while it was being run"):
            batch.request(1)


def test_what_comes_through_a_pipe_is_kept_to_be_read_again(tmp_path):
    content, pipe = with_line() + b"\n" + with_line(custom_id="b"), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    with read_batch(pipe) as batch:
        writer.join()
        assert [request.custom_id for request in batch] == ["req-1", "b"]
        assert batch.sha256 == hashlib.sha256(content).hexdigest()


def test_memory_does_not_grow_with_the_requests(tmp_path):
    """36 bytes a request are kept, beside what any file costs."""
    path = write(tmp_path, *(with_body(prompt=f"{n} " * 200).replace(b"req-1", b"%d" % n) for n in range(2000)))
    tracemalloc.start()
    try:
        with read_batch(path) as batch:
            kept, peak = tracemalloc.get_traced_memory()
            assert len(batch) == 2000
    finally:
        tracemalloc.stop()
    assert max(kept, peak) < path.stat().st_size / 4
