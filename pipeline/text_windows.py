"""Text files as windows of tokens, for training and judging predictors.

Axes: W windows, C tokens of a window.

The convention, which `describe` puts into words: each file begins with the model's begin-of-sequence token; the files' tokens are
joined and cut into pieces of C - 1 that do not overlap; each piece is preceded by the begin-of-sequence token, and what is left at the
end is dropped. So a window scores its C - 1 tokens of text, each from all the tokens before it in its window and from none outside.
"""

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..errors import InflashError

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TextWindows:
    """Tokens to run a model over.

    Attributes:
      token_ids: [W, C] int32; the first of each row is the begin-of-sequence token.
      source: where the text is from, for people.
    """

    token_ids: np.ndarray
    source: str

    @property
    def num_windows(self) -> int:
        return len(self.token_ids)

    @property
    def context(self) -> int:
        return self.token_ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of text, W (C - 1)."""
        return self.num_windows * (self.context - 1)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens: the same text in the same windows."""
        return hashlib.sha256(np.ascontiguousarray(self.token_ids, "<i4").tobytes() + str(self.context).encode()).hexdigest()

    def describe(self) -> str:
        return (
            f"{self.num_tokens} tokens in {self.num_windows} windows of {self.context} with stride {self.context - 1}, each begun with "
            "the begin-of-sequence token, which is not scored"
        )


def read_windows(
    files: Sequence[Path], tokenizer: Tokenizer, *, bos_id: int, context: int, most_tokens: int | None, least_windows: int = 1
) -> TextWindows:
    """Tokenises text files and cuts them into windows.

    Args:
      files: UTF-8 text.
      tokenizer: the model's.
      bos_id: the begin-of-sequence token.
      context: C, at least 2.
      most_tokens: of text to use, rounded up to whole windows, each file giving its beginning in proportion to its size; None: all.
      least_windows: with fewer there is nothing to be done.

    Raises:
      InflashError: a file cannot be read or is not UTF-8, all are empty, or the text is too short.
    """
    sizes = [_size(file) for file in files]
    if not all(file.is_file() for file in files):
        sizes = [1 for _ in files]  # what a pipe will give is not known
    if not sum(sizes):
        raise InflashError(
            f"{', '.join(map(str, files))}: expected some text, found {'empty files' if len(files) > 1 else 'an empty file'}"
        )
    wanted = None if most_tokens is None else -(-most_tokens // (context - 1)) * (context - 1)
    tokens: list[int] = []
    for number, file in enumerate(files):
        if not sizes[number]:
            continue
        tokens.append(bos_id)
        # What an earlier file was too short for, later ones give.
        target = None if wanted is None else -(-wanted * sum(sizes[: number + 1]) // sum(sizes))
        for piece in _pieces(file):
            tokens.extend(tokenizer.encode(piece, add_special_tokens=False).ids)
            if target is not None and len(tokens) >= target:
                del tokens[target:]
                break
    windows = len(tokens) // (context - 1)
    if windows < least_windows:
        raise InflashError(
            f"text: expected at least {least_windows} window{'s' * (least_windows > 1)} of {context} tokens, found {len(tokens)} tokens in "
            f"{', '.join(map(str, files))}; give more text, or a smaller --context"
        )
    return TextWindows(token_ids=_as_windows(tokens, windows, context, bos_id), source=", ".join(str(file) for file in files))


def windows_of(tokens: np.ndarray, *, bos_id: int, context: int, source: str) -> TextWindows:
    """The same windows from token ids."""
    return TextWindows(token_ids=_as_windows(tokens, len(tokens) // (context - 1), context, bos_id), source=source)


def _as_windows(tokens: Sequence[int] | np.ndarray, windows: int, context: int, bos_id: int) -> np.ndarray:
    rows = np.full((windows, context), bos_id, np.int32)
    rows[:, 1:] = np.asarray(tokens[: windows * (context - 1)], np.int32).reshape(windows, context - 1)
    return rows


def _size(file: Path) -> int:
    try:
        size = file.stat().st_size
        file.open("rb").close()
    except OSError as error:
        raise InflashError(f"{file}: this text file cannot be read: {error.strerror}") from error
    return size


def _pieces(file: Path) -> Iterator[str]:
    """The text in pieces that end with a line, where lines end."""
    decoder, held, offset = codecs.getincrementaldecoder("utf-8")(), "", 0
    try:
        with file.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                text = held + decoder.decode(block)
                offset += len(block)
                cut = text.rfind("\n") + 1 or len(text)
                held = text[cut:]
                yield text[:cut]
            yield held + decoder.decode(b"", final=True)
    except OSError as error:
        raise InflashError(f"{file}: this text file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InflashError(
            f"{file}: expected UTF-8 text, found other bytes within {_READ_BYTES} bytes of offset {offset} ({error.reason}); "
            "convert the file to UTF-8"
        ) from error
