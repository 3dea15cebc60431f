"""One request of a batch file: what OpenAI's two endpoints for text may ask, checked field by field."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InflashError
from .batch_json import check_encodable, check_known, shown, text_field
from .prompts import NEW_DOCUMENT, Prompt
from .sampling_params import MAX_LOGPROBS, MAX_TOKENS, SamplingParams

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
URLS = (COMPLETIONS, CHAT)
MAX_PROMPTS, MAX_CHOICES = 2048, 4096
"""That a line may have: its answer is held until the last of them is finished."""

ROLES = ("system", "developer", "user", "assistant")
LINE_FIELDS = ("custom_id", "method", "url", "body")
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
INERT_FIELDS = (
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)
"""What does not change a text, whatever it says; `model` and `user` should be strings."""

_PROMPT = "a string or a list of token ids"
_WHOLE = "results come whole, when the request is finished"
_NO_TOOLS = "no tools are called"
_TEXT_ONLY = "answers are text"
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {  # why it is refused, and the values that ask for nothing
    "stream": (_WHOLE, (None, False)),
    "stream_options": (_WHOLE, (None,)),
}
_REFUSED_COMPLETIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **_REFUSED,
    "echo": ("join the prompt and the text yourself", (None, False)),
    "best_of": ("all n continuations are returned, none is picked", (None,)),  # or as many as n
    "suffix": ("a text is only continued at its end", (None, "")),
}
_REFUSED_CHAT: dict[str, tuple[str, tuple[Any, ...]]] = {
    **_REFUSED,
    "tools": (_NO_TOOLS, (None, [])),
    "tool_choice": (_NO_TOOLS, (None, "none", "auto")),
    "parallel_tool_calls": (_NO_TOOLS, (None, True, False)),
    "functions": (_NO_TOOLS, (None, [])),
    "function_call": (_NO_TOOLS, (None, "none", "auto")),
    "response_format": ("the form of an answer cannot be enforced", (None, {"type": "text"})),
    "modalities": (_TEXT_ONLY, (None, ["text"])),
    "audio": (_TEXT_ONLY, (None,)),
    "prediction": ("nothing is predicted from a draft", (None,)),
    "reasoning_effort": ("there is no separate reasoning", (None, "none")),
    "verbosity": ("length is bounded by max_completion_tokens only", (None, "medium")),  # its default
    "web_search_options": ("nothing is looked up", (None,)),
    "moderation": ("nothing is moderated", (None,)),
}
_FIELDS = {
    COMPLETIONS: ("prompt", *INERT_FIELDS, *SAMPLING_FIELDS, *_REFUSED_COMPLETIONS),
    CHAT: ("messages", "max_completion_tokens", "top_logprobs", *INERT_FIELDS, *SAMPLING_FIELDS, *_REFUSED_CHAT),
}

Message = Mapping[str, str]
"""`role`, `content` and perhaps `name`, all text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """One line of a batch file.

    Attributes:
      custom_id: the user's name for it, unique in its file.
      line: its line number, from 1.
      url: one of URLS.
      model: the name that the line gives; None where it gives none.
      prompts: a chat's {"messages": [...]}, or a completion's texts, token ids (not yet checked against a vocabulary) or NEW_DOCUMENT.
      sampling_params: how to continue each of them.
    """

    custom_id: str
    line: int
    url: str
    model: str | None
    prompts: tuple[Prompt, ...]
    sampling_params: SamplingParams


def parse_request(
    document: dict[str, Any], line: int, command_line: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> BatchRequest:
    """Checks a line's object.

    Args:
      document: the line.
      line: its number.
      command_line: `SamplingParams` fields for requests that do not give them.
      generation_config: the model's defaults for what neither gives.

    Raises:
      InflashError: for the first thing that is wrong with it.
    """
    check_known(document, LINE_FIELDS, "line")
    custom_id = text_field(document, "custom_id")
    if document.get("method") != "POST":
        raise InflashError(f"method should be 'POST', found {shown(document.get('method'))}")
    url = document.get("url")
    if not isinstance(url, str) or url not in URLS:
        raise InflashError(f"url should be '{COMPLETIONS}' or '{CHAT}', found {shown(url)}")
    body = document.get("body")
    if not isinstance(body, dict):
        raise InflashError(f"body should be an object, found {shown(body)}")
    chat = url == CHAT
    check_known(body, _FIELDS[url], "body")
    _check_refused(body, _REFUSED_CHAT if chat else _REFUSED_COMPLETIONS)
    for name in ("model", "user"):
        if body.get(name) is not None:
            text_field(body, name, least=0)
    given = {name: body[name] for name in SAMPLING_FIELDS if body.get(name) is not None}
    if chat:
        given = _chat_fields(
            body, given, limited="max_tokens" in command_line or generation_config.get("max_new_tokens") is not None
        )
    params = SamplingParams.from_defaults(generation_config, **{**command_line, **given})
    for string in params.stop_strings:
        check_encodable(string, "stop")
    prompts: tuple[Prompt, ...] = ({"messages": _messages(body.get("messages"))},) if chat else _prompts(body)
    if len(prompts) * params.n > MAX_CHOICES:
        raise InflashError(
            f"prompt has {len(prompts)} prompts and n is {params.n}; a line may have {MAX_CHOICES} choices, make several of it"
        )
    return BatchRequest(
        custom_id=custom_id,
        line=line,
        url=url,
        model=body.get("model"),
        prompts=prompts,
        sampling_params=params,
    )


def _check_refused(body: dict[str, Any], refused: Mapping[str, tuple[str, tuple[Any, ...]]]) -> None:
    for name, (reason, neutral) in refused.items():
        value = body.get(name)
        if name == "best_of":
            neutral = (None, body.get("n") or 1)
        if not any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            raise InflashError(f"body asks for {name} = {shown(value)}, which is not supported: {reason}; leave {name} out")


def _chat_fields(body: dict[str, Any], given: dict[str, Any], *, limited: bool) -> dict[str, Any]:
    """Chat's own names for the limit of tokens and for log probabilities, as fields of `SamplingParams`.

    Args:
      body, given: the request's, and what of it `SamplingParams` knows by the same name.
      limited: there is a default for the number of tokens.
    """
    limit, other = body.get("max_completion_tokens"), given.get("max_tokens")
    if limit is not None and other is not None and limit != other:
        raise InflashError(f"max_completion_tokens is {shown(limit)} and max_tokens {shown(other)}; give one of them")
    if limit is not None:
        given["max_tokens"] = limit
    elif other is None and not limited:
        given["max_tokens"] = MAX_TOKENS  # as OpenAI does: to the end of the text or of the model's positions
    wanted, top = given.pop("logprobs", False), body.get("top_logprobs")
    if not isinstance(wanted, bool):
        raise InflashError(f"logprobs should be true or false for {CHAT}, found {shown(wanted)}; top_logprobs is their number")
    if top is not None and not wanted:
        raise InflashError(f"top_logprobs = {shown(top)} needs logprobs = true")
    if top is not None and (not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= MAX_LOGPROBS):
        raise InflashError(f"top_logprobs should be an integer from 0 to {MAX_LOGPROBS}, found {shown(top)}")
    if wanted:
        given["logprobs"] = top or 0
    return given


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise InflashError(f"messages should be a list of messages, not empty, found {shown(messages)}")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise InflashError(f"{where} should be an object, found {shown(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InflashError(f"{where}.role should be one of {', '.join(ROLES)}, found {shown(role)}")
    nothing = {name: value for name, value in message.items() if name in ("tool_calls", "function_call", "audio")}
    if asked := [name for name, value in nothing.items() if value not in (None, [])]:
        raise InflashError(f"{where} has {asked[0]}, which is not supported; messages are text")
    answer = role == "assistant"  # the only one who may say nothing, or refuse to say more
    known = ("role", "content", "name", *(["refusal"] if answer else []))
    check_known({name: value for name, value in message.items() if name not in nothing}, known, where)
    content, refusal = message.get("content"), message.get("refusal")
    parts: list[str] = []
    if content is not None or not answer:
        parts.append(_content(content, f"{where}.content", ("text", "refusal") if answer else ("text",)))
    if refusal is not None:
        if not isinstance(refusal, str):
            raise InflashError(f"{where}.refusal should be a string, found {shown(refusal)}")
        check_encodable(refusal, f"{where}.refusal")
        parts.append(refusal)
    found = {"role": role, "content": "\n".join(filter(None, parts))}
    if message.get("name") is not None:
        found["name"] = text_field(message, "name")
    return found


def _content(content: Any, where: str, kinds: tuple[str, ...]) -> str:
    """A message's text, which may come in parts of some kinds."""
    if isinstance(content, list):
        for place, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in kinds or not isinstance(part.get(kind), str):
                raise InflashError(f'{where}[{place}] should be {{"type": "text", "text": ...}}; only text is supported')
        content = "\n".join(part[part["type"]] for part in content)
    if not isinstance(content, str):
        raise InflashError(f"{where} should be a string or a list of text parts, found {shown(content)}")
    check_encodable(content, where)
    return content


def _prompts(body: dict[str, Any]) -> tuple[Prompt, ...]:
    """What a completion continues: one prompt, or a list of them."""
    if "prompt" not in body:
        raise InflashError(f"prompt should be {_PROMPT}, or a list of prompts, found nothing; null begins a new document")
    prompt = body["prompt"]
    if prompt is None:
        return (NEW_DOCUMENT,)
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], (int, float)):
        return (_prompt(prompt, "prompt"),)
    if len(prompt) > MAX_PROMPTS:
        raise InflashError(f"prompt should be a list of at most {MAX_PROMPTS} prompts, found {len(prompt)}; make lines of them")
    return tuple(_prompt(each, f"prompt[{place}]") for place, each in enumerate(prompt))


def _prompt(prompt: Any, where: str) -> Prompt:
    if isinstance(prompt, str):
        check_encodable(prompt, where)
        return prompt or NEW_DOCUMENT
    if not isinstance(prompt, list):
        raise InflashError(f"{where} should be {_PROMPT}, found {shown(prompt)}")
    if not prompt:
        raise InflashError(f"{where} should not be an empty list; leave the line out, or write null to begin a new document")
    for place, token in enumerate(prompt):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= MAX_TOKENS:
            raise InflashError(f"{where}[{place}] should be a token id (an integer from 0 to {MAX_TOKENS}), found {shown(token)}")
    return tuple(prompt)
