"""From token ids to text, a token at a time.

In a byte-level BPE a token stands for bytes, not characters: one character may take several tokens, and a token may end in the
middle of one. `TokenBytes` knows every token's bytes; a `TextStream` joins one sequence's, shows whole characters only, and
watches for stop strings wherever the token borders fall. A token costs the length of its own text and of the longest stop string.
"""

import codecs

from tokenizers import Tokenizer

from ..errors import InflashError


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 characters stand for themselves, those from U+0100 on for the other bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of(token: str) -> bytes:
    """Added tokens, such as runs of spaces, may be outside the alphabet and then stand for themselves."""
    if all(character in BYTE_OF_CHARACTER for character in token):
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    return token.encode("utf-8")


class TokenBytes:
    """The bytes of every token of a tokenizer; made once, shared by all sequences."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Reads the vocabulary.

        Args:
          tokenizer: a byte-level BPE (GPT-2's kind, which OPT uses).

        Raises:
          InflashError: for a tokenizer of another kind.
        """
        kind = type(tokenizer.decoder).__name__
        if kind != "ByteLevel":
            raise InflashError(f"tokenizer: its decoder should be ByteLevel (byte-level BPE), found {kind}")
        special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._bytes = {token_id: _bytes_of(token) for token, token_id in vocabulary.items() if token_id not in special}

    def __getitem__(self, token_id: int) -> bytes:
        """A token's bytes; none for special tokens and for ids that only pad the model's vocabulary."""
        return self._bytes.get(token_id, b"")

    def text(self, token_id: int) -> str:
        """A token by itself, with U+FFFD for bytes that are no whole character."""
        return self[token_id].decode("utf-8", "replace")


class TextStream:
    """The text of one sequence while it grows."""

    def __init__(self, token_bytes: TokenBytes | None, stop: tuple[str, ...] = ()) -> None:
        """Starts empty.

        Args:
          token_bytes: of the model's tokenizer; None for a model without one, whose text stays empty.
          stop: strings that end the text.

        Raises:
          InflashError: for stop strings without a tokenizer.
        """
        if stop and token_bytes is None:
            raise InflashError("stop: strings need a tokenizer, which this model has not; give stop_token_ids")
        self._token_bytes = token_bytes
        self._stop = stop
        self._kept = max(map(len, stop), default=1) - 1  # characters of which a stop string may still be made
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces: list[str] = []
        self._tail = ""
        self.piece = ""

    @property
    def text(self) -> str:
        """The whole characters so far, without the stop string that ended them."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Adds a token. A token that stops the sequence by its id has no text and is not pushed.

        Args:
          token_id: the token.
          may_stop: False before `min_tokens`; what comes then is no part of a stop string.

        Returns:
          The stop string that is now complete, with the text cut before it, or None. Of several, the one that is complete first.
          `piece` then holds the characters that the token completed, uncut.
        """
        if self._token_bytes is None:
            return None
        self.piece = self._decoder.decode(self._token_bytes[token_id])
        self._pieces.append(self.piece)
        if not self._stop:
            return None
        if not may_stop:
            self._tail = ""
            return None
        window = self._tail + self.piece
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := window.find(stop)) >= 0]
        if not found:
            self._tail = window[-self._kept :] if self._kept else ""
            return None
        _, at, stop = min(found)
        text = self.text
        self._pieces = [text[: len(text) - len(window) + at]]
        return stop
