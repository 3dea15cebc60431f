"""From what a caller gives to the token ids that the model sees: texts, messages, or the ids themselves.

A text is the caller's own, so special tokens written in it count, as they do in vLLM. Messages are made a text by the model's chat
template; there only the template's special tokens count, and those that somebody wrote into a message are ordinary characters.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InflashError
from ..storage.store import Store
from .chat_template import ChatTemplate, load_chat_template
from .model_files import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Prompt = str | Mapping[str, Any] | Sequence[int]
"""A text, {"prompt": text}, {"messages": [{"role", "content"}]}, {"prompt_token_ids": [...]}, the token ids themselves, or NEW_DOCUMENT."""

NEW_DOCUMENT: Prompt = MappingProxyType({"prompt": None})
"""No text: the model begins one, after its begin-of-sequence token."""

_KEYS = ("prompt", "prompt_token_ids", "messages")


_MOST_TOGETHER = 1 << 18
"""Characters of texts that are encoded together: the tokenizer takes 60 bytes for each meanwhile."""

Asked = TypeVar("Asked")


def portions(asked: Iterable[Asked], prompt: Callable[[Asked], Prompt]) -> Iterator[list[Asked]]:
    """What may be encoded together, in its order: texts of no more than `_MOST_TOGETHER` characters; a longer one, and all else, alone."""
    portion: list[Asked] = []
    length = 0
    for each in asked:
        given = prompt(each)
        size = len(given) if isinstance(given, str) and given else _MOST_TOGETHER + 1
        if portion and length + size > _MOST_TOGETHER:
            yield portion
            portion, length = [], 0
        portion.append(each)
        length += size
    if portion:
        yield portion


class PromptEncoder:
    """Encodes prompts for one model.

    Attributes:
      tokenizer: the model's; None for one that takes token ids only.
    """

    def __init__(self, store: Store) -> None:
        self.tokenizer = load_tokenizer(store)
        self._folder = store.tokenizer_folder
        self._bos_token_id = store.config.bos_token_id
        self._template: ChatTemplate | None = None
        self._chat: ChatTokens | None = None

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text, where it has one, and its token ids.

        Raises:
          InflashError: it is of no known form or empty, the model has no tokenizer or no chat template for it, or the template refuses it.
        """
        if isinstance(prompt, Mapping):
            if len(prompt) != 1 or not set(prompt) <= set(_KEYS):
                raise InflashError(f"prompt: expected one of {', '.join(map(repr, _KEYS))}, found the keys {sorted(prompt)}")
            ((kind, prompt),) = prompt.items()
            if kind == "messages":
                return self._encode_messages(prompt)
            if kind == "prompt" and prompt is None:
                return "", [self._bos_token_id]
        if isinstance(prompt, str):
            if not prompt:
                raise InflashError("prompt: expected some text, found an empty string; {'prompt': None} begins a new document")
            return prompt, self._needed_tokenizer().encode(prompt).ids
        if not isinstance(prompt, Sequence):
            raise InflashError(f"prompt: expected a text or a list of token ids, found {prompt!r:.40}")
        if others := [i for i in prompt if not isinstance(i, int) or isinstance(i, bool)]:
            raise InflashError(f"prompt: expected a text or a list of token ids, found {others[0]!r:.40} in a list")
        return None, list(prompt)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts that are not empty, on all processors at once.

        Raises:
          InflashError: the model has no tokenizer.
        """
        return [encoding.ids for encoding in self._needed_tokenizer().encode_batch(list(texts))]

    def close(self) -> None:
        """Ends the process that renders templates, if there is one. Idempotent."""
        if self._template is not None:
            self._template.close()

    def _encode_messages(self, messages: Any) -> tuple[str, list[int]]:
        tokenizer = self._needed_tokenizer()
        if not isinstance(messages, Sequence) or not all(_is_message(message) for message in messages) or not messages:
            raise InflashError('messages: expected a list of {"role": text, "content": text}, not empty')
        if self._template is None or self._chat is None:
            self._template, self._chat = load_chat_template(self._folder), ChatTokens(tokenizer)
        chat = self._chat
        hidden: list[str] = []
        safe = [{name: value if name == "role" else chat.hide(value, hidden) for name, value in m.items()} for m in messages]
        return chat.encode(self._template.render(safe), hidden)

    def _needed_tokenizer(self) -> "Tokenizer":
        if self.tokenizer is None:
            raise InflashError("prompt: this store has no tokenizer; give token ids, or convert again with its tokenizer files")
        return self.tokenizer


class ChatTokens:
    """Keeps special tokens that stand in messages apart from those of the template.

    Before rendering, whatever in a message could be taken for a special token, or for a piece of one at its ends, is replaced by a mark
    that nobody can guess; afterwards the special tokens that are found are the template's.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token.content: (token_id, token) for token_id, token in added if token.special and token.content}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._inner = {t[a:b] for t in self._special for a in range(len(t)) for b in range(a + 1, len(t) + 1)}
        self._ends = {t[a:] for t in self._special for a in range(1, len(t))}
        self._beginnings = {t[:b] for t in self._special for b in range(1, len(t))}
        self._longest = max(map(len, self._special), default=0)
        self._nonce = str(secrets.randbits(64))
        self._mark = re.compile(f"\ue000{self._nonce}:([0-9]+)\ue001")

    def hide(self, text: str, hidden: list[str]) -> str:
        """The text with marks in it; what they stand for is added to `hidden`."""

        def mark(piece: str) -> str:
            hidden.append(piece)
            return f"\ue000{self._nonce}:{len(hidden) - 1}\ue001"

        inside = text.strip()  # which templates do, too
        if not inside:
            return text
        start = text.index(inside)
        before, after = text[:start], text[start + len(inside) :]
        if len(inside) <= self._longest and inside in self._inner:
            return before + mark(inside) + after
        head = max((n for n in range(1, min(self._longest, len(inside))) if inside[:n] in self._ends), default=0)
        tail = max((n for n in range(1, min(self._longest, len(inside) - head)) if inside[-n:] in self._beginnings), default=0)
        middle = self._found.sub(lambda match: mark(match[0]), inside[head : len(inside) - tail])
        return "".join([before, mark(inside[:head]) if head else "", middle, mark(inside[-tail:]) if tail else "", after])

    def encode(self, rendered: str, hidden: Sequence[str]) -> tuple[str, list[int]]:
        """The text without marks, and its token ids.

        Raises:
          InflashError: the template took a mark apart.
        """
        ids: list[int] = []
        texts: list[str] = []
        at, strip_left = 0, False
        for match in self._found.finditer(rendered):
            token_id, token = self._special[match[0]]
            piece = self._shown(rendered[at : match.start()], hidden)
            texts += [piece, match[0]]
            ids += self._plain(piece, left=strip_left, right=token.lstrip)
            ids.append(token_id)
            at, strip_left = match.end(), token.rstrip
        piece = self._shown(rendered[at:], hidden)
        text = "".join([*texts, piece])
        return text, ids + self._plain(piece, left=strip_left, right=False)

    def _shown(self, piece: str, hidden: Sequence[str]) -> str:
        shown = self._mark.sub(lambda match: hidden[int(match[1])], piece)
        if self._nonce in shown:
            raise InflashError("messages: the chat template takes a message apart where it holds a special token; leave that out")
        return shown

    def _plain(self, piece: str, *, left: bool, right: bool) -> list[int]:
        """Tokens of text in which nothing is special; `left` and `right`: the special token there takes the spaces beside it."""
        piece = piece.lstrip() if left else piece
        piece = piece.rstrip() if right else piece
        if not piece:
            return []
        before, self._tokenizer.encode_special_tokens = self._tokenizer.encode_special_tokens, True
        try:
            return self._tokenizer.encode(piece, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = before


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        return False
    return all(isinstance(value, str) for value in message.values()) and message["role"].isidentifier()
