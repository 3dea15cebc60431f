import math

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from inflash.pipeline.batch_requests import CHAT, COMPLETIONS
from inflash.pipeline.batch_results import failed_line, refused_line, success_line
from inflash.pipeline.outputs import CompletionOutput, Logprob, RequestOutput

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}


def an_output(num_choices: int = 1, text: str = "there was", logprobs: list[dict[int, Logprob]] | None = None) -> RequestOutput:
    choices = [
        CompletionOutput(index=index, text=text, token_ids=[4, 9], finish_reason="length", logprobs=logprobs)
        for index in range(num_choices)
    ]
    return RequestOutput(request_id="0", prompt="Once upon", prompt_token_ids=[2, 7, 8], outputs=choices, num_cached_tokens=2)


def test_a_success_has_the_completion_object_s_form():
    line = success_line("req-1", [an_output(2)], "opt", 1_700_000_000, COMPLETIONS)
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
        "usage": USAGE,
    }


def test_a_line_of_several_prompts_has_the_choices_of_all():
    outputs = [an_output(2, text="a"), an_output(2, text="b"), an_output(2, text="c")]
    body = success_line("req-1", outputs, "opt", 0, COMPLETIONS)["response"]["body"]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == list(enumerate("aabbcc"))
    assert body["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 12,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 6},
    }


def test_refused_and_failed_lines_say_whose_fault_it_was():
    refused = refused_line("a", "too long", param="prompt")
    assert refused["error"] is None
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"] == {
        "error": {"message": "too long", "type": "invalid_request_error", "param": "prompt", "code": None}
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
    (choice,) = success_line("a", [an_output(logprobs=places)], "m", 0, COMPLETIONS)["response"]["body"]["choices"]
    assert choice["logprobs"] == {
        "tokens": ["日", " b"],
        "token_logprobs": [-1.5, -9999.0],
        "top_logprobs": [{"日": -1.5, "a": -0.5}, {" b": -9999.0, "\ufffd": -0.1}],
        "text_offset": [0, 1],
    }


def test_logprobs_without_a_tokenizer_name_the_ids():
    places = [{4: Logprob(logprob=-1.0)}, {9: Logprob(logprob=-2.0)}]
    (choice,) = success_line("a", [an_output(text="", logprobs=places)], "m", 0, COMPLETIONS)["response"]["body"]["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:4", "token_id:9"]


PLACES = [
    {4: Logprob(logprob=-1.5, rank=2, decoded_token="日"), 1: Logprob(logprob=-0.5, rank=1, decoded_token="a")},
    {
        3: Logprob(logprob=-0.1, rank=1, decoded_token="c"),
        6: Logprob(logprob=-4.0, rank=2, decoded_token="d"),
        9: Logprob(logprob=-math.inf, rank=90, decoded_token="b"),
    },
]


def test_a_chat_has_the_chat_completion_object_s_form():
    body = success_line("req-1", [an_output(2)], "opt", 1_700_000_000, CHAT)["response"]["body"]
    assert body.pop("id").startswith("chatcmpl-")
    message = {"role": "assistant", "content": "there was", "refusal": None}
    choice = {"message": message, "logprobs": None, "finish_reason": "length"}
    assert body == {
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "opt",
        "choices": [{"index": 0, **choice}, {"index": 1, **choice}],
        "usage": USAGE,
    }


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_logprobs_of_a_chat_are_those_asked_for_beside_the_chosen_token(asked):
    line = success_line("a", [an_output(logprobs=PLACES)], "m", 0, CHAT, top_logprobs=asked)
    first, second = line["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("日", -1.5, list("日".encode()))
    assert (second["token"], second["logprob"]) == ("b", -9999.0)
    assert [entry["token"] for entry in first["top_logprobs"]] == ["a", "日"][:asked]
    assert [entry["token"] for entry in second["top_logprobs"]] == ["c", "d"][:asked]


def test_openai_s_own_types_parse_the_bodies():
    logprobs = an_output(2, logprobs=PLACES)
    for outputs in ([an_output()], [logprobs], [an_output(), logprobs]):
        body = success_line("a", outputs, "m", 5, COMPLETIONS)["response"]["body"]
        assert Completion.model_validate(body).model_dump(exclude_unset=True) == body
        body = success_line("a", outputs, "m", 5, CHAT, top_logprobs=2)["response"]["body"]
        assert ChatCompletion.model_validate(body).model_dump(exclude_unset=True) == body
