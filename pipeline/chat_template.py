"""A model's chat template: where it comes from, and the process that renders it."""

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InflashError
from ..storage.tokenizer_files import CHAT_TEMPLATE_FILE
from .interpreter import module_command, module_environment

CONFIG_FILE = "tokenizer_config.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RENDERER = module_command("pipeline.chat_renderer")
MOST_ENDLESS = 3
"""After so many endless renderings in a row nothing more is expected of a template."""

_ANSWER_S = 30.0  # far more than the two seconds of the processor that a rendering may take
_START_S = 60.0  # an interpreter's start on a busy machine


class ChatTemplateError(InflashError):
    """A template that is of no use for any messages."""


class ChatTemplate:
    """Makes prompts of messages. The process that does it starts with the first ones, and anew after one that it had to give up."""

    def __init__(self, source: str, tokens: Mapping[str, Any], where: str) -> None:
        """Takes a template.

        Args:
          source: its text, in jinja2's language.
          tokens: what it may name: the special tokens by role.
          where: its file, for messages.
        """
        self._source, self._tokens, self._where = source, dict(tokens), where
        self._process: subprocess.Popen[bytes] | None = None
        self._num_endless = 0

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt, up to where the assistant's answer begins.

        Raises:
          ChatTemplateError: the template is no template, or never ends.
          InflashError: it refuses these messages, or does not end on them.
        """
        if self._num_endless >= MOST_ENDLESS:
            raise ChatTemplateError(f"{self._where}: the chat template did not end, {MOST_ENDLESS} times in a row; correct it")
        if self._process is None:
            self._start()
        answer = self._ask({"messages": list(messages)}, _ANSWER_S)
        self._num_endless = self._num_endless + 1 if answer is None else 0
        if answer is None:
            raise InflashError(f"{self._where}: the chat template does not end on these messages; it was stopped")
        if "error" in answer:
            raise InflashError(f"{self._where}: the chat template refuses these messages: {answer['error']}")
        return answer["text"]

    def close(self) -> None:
        """Ends the process. Idempotent."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            RENDERER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=module_environment(),
            bufsize=0,
        )
        answer = self._ask({"template": self._source, "tokens": self._tokens}, _START_S)
        if answer is None:
            raise ChatTemplateError(f"{self._where}: the chat template cannot be compiled in time; correct it")
        if "error" in answer:
            self.close()
            raise ChatTemplateError(f"{self._where}: the chat template is broken: {answer['error']}; correct it")

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """The process's answer; None if it gave none, and then it is ended."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        deadline, parts = time.monotonic() + timeout_s, []
        try:
            self._tell(json.dumps(request).encode() + b"\n", deadline)
            while not parts or not parts[-1].endswith(b"\n"):
                if not select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                    break
                part = os.read(self._process.stdout.fileno(), 1 << 20)
                if not part:
                    break
                parts.append(part)
            else:
                return json.loads(b"".join(parts))
        except (BrokenPipeError, TimeoutError):
            pass
        self.close()
        return None

    def _tell(self, line: bytes, deadline: float) -> None:
        """Raises TimeoutError where the process takes nothing, and BrokenPipeError where it has ended."""
        assert self._process is not None and self._process.stdin is not None
        descriptor, rest = self._process.stdin.fileno(), memoryview(line)
        while rest:
            if not select.select([], [descriptor], [], max(deadline - time.monotonic(), 0))[1]:
                raise TimeoutError
            rest = rest[os.write(descriptor, rest[: select.PIPE_BUF]) :]  # so much is taken at once, without waiting


def load_chat_template(folder: Path) -> ChatTemplate:
    """The template that a store's tokenizer files bring, as Hugging Face looks for it.

    Args:
      folder: the store's tokenizer folder.

    Raises:
      ChatTemplateError: there is none, or its file is malformed.
    """
    config: Any = {}
    if (folder / CONFIG_FILE).exists():
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"{folder / CONFIG_FILE}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise ChatTemplateError(f"{folder / CONFIG_FILE}: expected a JSON object, found {type(config).__name__}")
    source, where = config.get("chat_template"), folder / CONFIG_FILE
    if (folder / CHAT_TEMPLATE_FILE).exists():
        where = folder / CHAT_TEMPLATE_FILE
        try:
            source = where.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ChatTemplateError(f"{where}: cannot be read as UTF-8 text: {error}") from error
    if isinstance(source, list):  # several by name, in older files
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if source is None:
        raise ChatTemplateError(
            f"this model has no chat template, so it takes no messages: neither {CHAT_TEMPLATE_FILE} nor chat_template in {CONFIG_FILE} in "
            f"{folder}; use /v1/completions, or convert the model again with such a file"
        )
    if not isinstance(source, str):
        raise ChatTemplateError(f"{where}: chat_template should be a text, found {type(source).__name__}")
    tokens = {role: token for role in ROLES if (token := _token_text(config.get(role))) is not None}
    return ChatTemplate(source, tokens, str(where))


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
