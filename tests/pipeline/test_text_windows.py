"""Text files as windows of tokens. Axes: W windows, C tokens of a window."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, fresh_seed

from inflash.errors import InflashError
from inflash.pipeline import text_windows
from inflash.pipeline.text_windows import TextWindows, read_windows, windows_of

TOKENIZER = byte_tokenizer()
BOS = 1


def ids(text: str) -> list[int]:
    """A token a byte."""
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def random_text(length: int) -> str:
    """Of ASCII, with a line about every twenty characters."""
    rng = np.random.default_rng(fresh_seed())
    return "".join(rng.choice([*"abcdefghijklmnopqrs", "\n"], length))


def write(folder: Path, *texts: str | bytes) -> list[Path]:
    files = [folder / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    return files


def read(files: list[Path], context: int = 8, most_tokens: int | None = None, **options: int) -> TextWindows:
    return read_windows(files, TOKENIZER, bos_id=BOS, context=context, most_tokens=most_tokens, **options)


def cut(tokens: list[int], context: int) -> list[list[int]]:
    """The convention, written again: pieces of C - 1, each after a begin-of-sequence token; what is left is dropped."""
    pieces = []
    while len(tokens) >= context - 1:
        pieces.append([BOS, *tokens[: context - 1]])
        tokens = tokens[context - 1 :]
    return pieces


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_windows, "_READ_BYTES", 13)


@pytest.mark.parametrize("context", [2, 3, 8, 50])
def test_files_are_begun_joined_and_cut(tmp_path: Path, context: int) -> None:
    texts = [random_text(length) for length in (100, 1, 61)]
    windows = read(write(tmp_path, *texts), context)
    tokens = [token for text in texts for token in (BOS, *ids(text))]
    assert windows.token_ids.dtype == np.int32
    assert windows.token_ids.tolist() == cut(tokens, context)
    assert (windows.num_windows, windows.context) == (165 // (context - 1), context)
    assert windows.num_tokens == windows.num_windows * (context - 1)
    assert windows.source == ", ".join(str(tmp_path / f"{number}.txt") for number in range(3))


def test_the_convention_in_words(tmp_path: Path) -> None:
    windows = read(write(tmp_path, "x" * 30), 8)
    assert windows.describe().startswith("28 tokens in 4 windows of 8 with stride 7, each begun with the begin-of-sequence token")


@given(text=st.text(st.sampled_from("ab\n\r\u00e9\u4e2d\U0001f30a"), min_size=1, max_size=80))
def test_blocks_cut_no_character(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Of one to four bytes, with lines and without, at the borders of what is read at once."""
    files = write(tmp_path_factory.mktemp("text"), text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_windows, "_READ_BYTES", 13)
        assert read(files, 2).token_ids[:, 1].tolist() == [BOS, *ids(text)]


def test_a_character_across_the_real_block_border(tmp_path: Path) -> None:
    border = text_windows._READ_BYTES
    text = "a" * (border - 2) + "\U0001f30a" + "b\n" * 3
    (tokens,) = read(write(tmp_path, text), len(text.encode()) + 2).token_ids.tolist()
    assert tokens == [BOS, BOS, *ids(text)]


@pytest.mark.parametrize("most_tokens", [1, 7, 8, 70, 99])
def test_each_file_gives_its_beginning_in_proportion_to_its_size(tmp_path: Path, most_tokens: int) -> None:
    texts = [random_text(length) for length in (300, 100, 200)]
    windows = read(write(tmp_path, *texts), 8, most_tokens)
    wanted = -(-most_tokens // 7) * 7
    assert windows.num_tokens == wanted
    tokens = windows.token_ids[:, 1:].ravel().tolist()
    ends = [-(-wanted * part // 6) for part in (3, 4, 6)]
    for text, start, end in zip(texts, [0, *ends], ends, strict=False):
        assert tokens[start:end] == [BOS, *ids(text)][: end - start]


def test_later_files_give_what_earlier_ones_are_too_short_for(tmp_path: Path) -> None:
    """Three bytes a token in the first file, so it has a third of its share."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["\u4e2d"])
    first, second = "\u4e2d" * 20, random_text(60)
    windows = read_windows(write(tmp_path, first, second), tokenizer, bos_id=BOS, context=8, most_tokens=70)
    tokens = windows.token_ids[:, 1:].ravel().tolist()
    assert tokens == [BOS, *[tokenizer.token_to_id("\u4e2d")] * 20, BOS, *ids(second)][:70]


def test_more_tokens_than_there_are(tmp_path: Path) -> None:
    text = random_text(50)
    assert read(write(tmp_path, text), 8, 10**9).token_ids.tolist() == read(write(tmp_path, text), 8).token_ids.tolist()


def test_only_the_beginning_is_read_when_little_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows is not even UTF-8."""
    monkeypatch.setattr(text_windows, "_READ_BYTES", 64)
    (file,) = write(tmp_path, b"x" * 64 + b"\xff" * 1000)
    assert read([file], 8, 14).num_tokens == 14
    with pytest.raises(InflashError, match="expected UTF-8 text"):
        read([file], 8)


@pytest.mark.parametrize("most_tokens", [None, 21])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_empty_file_among_others_is_skipped(tmp_path: Path, place: int, most_tokens: int | None) -> None:
    """It does not even begin: there is one begin-of-sequence token less."""
    texts = [random_text(40), random_text(40)]
    with_empty = [*texts[:place], "", *texts[place:]]
    (tmp_path / "others").mkdir()
    found = read(write(tmp_path, *with_empty), 8, most_tokens)
    assert found.token_ids.tolist() == read(write(tmp_path / "others", *texts), 8, most_tokens).token_ids.tolist()


@pytest.mark.parametrize(
    ("content", "context", "said"),
    [
        (None, 8, "this text file cannot be read: No such file"),
        ("folder", 8, "this text file cannot be read: Is a directory"),
        (b"", 8, "expected some text, found an empty file"),
        (b"caf\xe9 au lait, latin-1", 8, r"expected UTF-8 text, .*offset 0 \(.*\); convert the file to UTF-8"),
        ("\u4e2d".encode()[:2], 2, "expected UTF-8 text"),  # ends within a character
        (b"only 13 bytes", 16, "text: expected at least 1 window of 16 tokens, found 14 tokens in .*smaller --context"),
    ],
    ids=["missing", "folder", "empty", "latin-1", "torn", "short"],
)
def test_bad_files_are_told(tmp_path: Path, content: bytes | str | None, context: int, said: str) -> None:
    file = tmp_path / "text.txt"
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(InflashError, match=said) as error:
        read([file], context)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_all_empty(tmp_path: Path) -> None:
    with pytest.raises(InflashError, match=r"0\.txt, .*1\.txt: expected some text, found empty files"):
        read(write(tmp_path, "", ""))


@pytest.mark.usefixtures("short_blocks")
def test_the_offset_of_what_is_not_utf8(tmp_path: Path) -> None:
    (file,) = write(tmp_path, b"a" * 30 + b"\xff")
    with pytest.raises(InflashError, match=r"within 13 bytes of offset 26 \(invalid start byte\)"):
        read([file])


def test_too_few_windows(tmp_path: Path) -> None:
    files = write(tmp_path, "x" * 20)  # 21 tokens
    assert read(files, 8, least_windows=3).num_windows == 3
    with pytest.raises(InflashError, match="expected at least 4 windows of 8 tokens, found 21 tokens"):
        read(files, 8, least_windows=4)


def test_the_digest_tells_texts_and_contexts_apart(tmp_path: Path) -> None:
    text = random_text(60)
    changed = text[:20] + chr(ord("a") + (ord(text[20]) - ord("a") + 1) % 26) + text[21:]
    (tmp_path / "moved").mkdir()
    windows = read(write(tmp_path, text, changed)[:1], 8)
    assert read(write(tmp_path / "moved", text), 8).digest == windows.digest  # wherever the file lies
    others = [read([tmp_path / "1.txt"], 8), read([tmp_path / "0.txt"], 9), read([tmp_path / "0.txt"], 8, 28)]
    # The same ids in the same order, in rows of another length.
    flat = np.full((4, 6), BOS, np.int32)
    others += [TextWindows(token_ids=flat.reshape(shape), source="") for shape in ((4, 6), (6, 4), (3, 8))]
    assert len({windows.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_windows_of_token_ids() -> None:
    tokens = np.random.default_rng(fresh_seed()).integers(2, 100, 40)
    windows = windows_of(tokens, bos_id=BOS, context=8, source="here")
    assert windows.token_ids.dtype == np.int32
    assert windows.token_ids.tolist() == cut(tokens.tolist(), 8)
    assert windows.source == "here"
