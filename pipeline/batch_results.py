"""The result lines of a batch run, in OpenAI's forms: answers, refusals and failures."""

import uuid
from collections.abc import Sequence
from typing import Any

from .batch_requests import CHAT
from .outputs import CompletionOutput, Logprob, RequestOutput

LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM writes this


def success_line(
    custom_id: str, outputs: Sequence[RequestOutput], model: str, created: int, url: str, top_logprobs: int = 0
) -> dict[str, Any]:
    """The result of a request that ran.

    Args:
      custom_id: the request's own name.
      outputs: what the engine gave back, one for each of its prompts.
      model: the name to report.
      created: Unix time in seconds.
      url: the endpoint, which decides the form.
      top_logprobs: how many of the likeliest tokens the request asked for.
    """
    chat = url == CHAT
    completions = [completion for output in outputs for completion in output.outputs]
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completion_tokens = sum(len(completion.token_ids) for completion in completions)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [
            _chat_choice(index, each, top_logprobs) if chat else _choice(index, each) for index, each in enumerate(completions)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs)},
        },
    }
    return _line(custom_id, {"status_code": 200, "request_id": f"req_{uuid.uuid4().hex}", "body": body}, None)


def refused_line(custom_id: str, message: str, *, param: str | None = None) -> dict[str, Any]:
    """The result of a request that cannot be run as it is (status 400).

    Args:
      custom_id: the request's own name.
      message: what is wrong with it.
      param: the field at fault.
    """
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    response = {"status_code": 400, "request_id": f"req_{uuid.uuid4().hex}", "body": {"error": error}}
    return _line(custom_id, response, None)


def failed_line(custom_id: str, code: str, message: str) -> dict[str, Any]:
    """The result of a request that failed through no fault of its own."""
    return _line(custom_id, None, {"code": code, "message": message})


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}


def _choice(index: int, completion: CompletionOutput) -> dict[str, Any]:
    logprobs = None if completion.logprobs is None else _logprobs(completion.token_ids, completion.logprobs)
    return {
        "index": index,
        "text": completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


def _chat_choice(index: int, completion: CompletionOutput, top_logprobs: int) -> dict[str, Any]:
    places = completion.logprobs
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": None if places is None else _chat_logprobs(completion.token_ids, places, top_logprobs),
        "finish_reason": completion.finish_reason,
    }


def _chat_logprobs(token_ids: list[int], places: list[dict[int, Logprob]], top_logprobs: int) -> dict[str, Any]:
    """OpenAI's form for chat: the chosen token of each place, and the likeliest ones beside it."""
    content = []
    for token_id, place in zip(token_ids, places, strict=True):
        ranked = sorted(place.items(), key=lambda item: -item[1].logprob)[:top_logprobs]
        content.append({**_chat_token(token_id, place[token_id]), "top_logprobs": [_chat_token(*item) for item in ranked]})
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, entry: Logprob) -> dict[str, Any]:
    text = _token_text(token_id, entry)
    return {"token": text, "logprob": max(entry.logprob, LEAST_LOGPROB), "bytes": list(text.encode())}


def _logprobs(token_ids: list[int], places: list[dict[int, Logprob]]) -> dict[str, list[Any]]:
    """OpenAI's form for completions; offsets count characters of the text."""
    tokens, values, top, offsets, offset = [], [], [], [], 0
    for token_id, place in zip(token_ids, places, strict=True):
        chosen = place[token_id]
        tokens.append(_token_text(token_id, chosen))
        values.append(max(chosen.logprob, LEAST_LOGPROB))
        best_last = sorted(place.items(), key=lambda item: item[1].logprob)  # where two have one text, the better stays
        top.append({_token_text(token, entry): max(entry.logprob, LEAST_LOGPROB) for token, entry in best_last})
        offsets.append(offset)
        offset += len(chosen.decoded_token or "")
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _token_text(token_id: int, entry: Logprob) -> str:
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token
