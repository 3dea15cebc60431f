import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from inflash.errors import InflashError
from inflash.pipeline.text import TextStream, TokenBytes

CORPUS = ["def f(x):\n    return x + 1\n", "naïve café — Überraschung, 日本語のテキスト 🙂🙃 zum Üben\n"] * 3


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("      "), AddedToken("日本 ")])
    return tokenizer


TOKENIZER = make_tokenizer()
TOKENS = TokenBytes(TOKENIZER)
VOCABULARY = TOKENIZER.get_vocab_size(with_added_tokens=True)
BYTE_IDS = {TOKENS[token]: token for token in range(VOCABULARY) if len(TOKENS[token]) == 1}
texts = st.text(st.sampled_from("ab é日🙂\n"), max_size=12)


def stream(ids, stop=()) -> tuple[TextStream, str | None, int]:
    """The stream after the tokens, the stop string that ended it, and how many tokens it took."""
    result = TextStream(TOKENS, stop)
    for number, token in enumerate(ids, 1):
        if (found := result.push(token)) is not None:
            return result, found, number
    return result, None, len(ids)


def by_bytes(text: str) -> list[int]:
    return [BYTE_IDS[bytes([byte])] for byte in text.encode()]


@given(st.lists(st.integers(0, VOCABULARY + 5), max_size=40))
@example([BYTE_IDS[b"\xed"], BYTE_IDS[b"\xa1"]])
def test_any_tokens_read_as_the_tokenizer_itself_reads_them(ids):
    result, _, _ = stream(ids)
    known = [token for token in ids if token < VOCABULARY]
    whole = TOKENIZER.decode(known)
    assert whole.startswith(result.text)
    assert set(whole[len(result.text) :]) <= {"\ufffd"}  # what is no whole character yet
    assert len(whole) - len(result.text) <= 2  # Python waits for more after the first two bytes of a surrogate, too


@given(st.text())
def test_encoded_text_comes_back_whole(text):
    assert stream(TOKENIZER.encode(text, add_special_tokens=False).ids)[0].text == TOKENIZER.decode(
        TOKENIZER.encode(text, add_special_tokens=False).ids
    )
    assert stream(by_bytes(text))[0].text == text


@given(texts)
def test_half_a_character_is_never_shown(text):
    result = TextStream(TOKENS)
    shown = ""
    for token in by_bytes(text):
        result.push(token)
        assert text.startswith(result.text)
        shown += result.piece
        assert shown == result.text
    assert shown == text


def test_special_and_padding_tokens_have_no_text():
    assert TOKENIZER.id_to_token(0) == "</s>"
    assert TOKENS.text(0) == ""
    assert TOKENS.text(VOCABULARY + 100) == ""
    assert TOKENS.text(BYTE_IDS[b"\xe6"]) == "\ufffd"


def test_bytes_that_are_no_utf8_become_replacement_characters():
    ids = [BYTE_IDS[byte] for byte in (b"a", b"\xff", b"\xe6", b"b")]
    assert stream(ids)[0].text == "a\ufffd\ufffdb" == TOKENIZER.decode(ids)


def first_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The plain rule: characters come one at a time, and the first stop string to be complete ends the text."""
    for end in range(1, len(text) + 1):
        endings = [string for string in stop if text[:end].endswith(string)]
        if endings:
            found = max(endings, key=len)
            return text[: end - len(found)], found
    return text, None


@given(texts, st.lists(st.text(st.sampled_from("ab é日"), min_size=1, max_size=4), max_size=3, unique=True), st.booleans())
def test_stop_strings_end_the_text_wherever_token_borders_fall(text, stop, split_bytes):
    ids = by_bytes(text) if split_bytes else TOKENIZER.encode(text, add_special_tokens=False).ids
    result, found, _ = stream(ids, tuple(stop))
    assert (result.text, found) == first_stop(text, tuple(stop))


def test_a_stop_string_over_three_tokens_ends_at_the_third():
    ids = by_bytes("one END two")
    result, found, used = stream(ids, ("END",))
    assert (result.text, found, used) == ("one ", "END", 7)


def test_a_stop_string_inside_one_token_cuts_both_sides():
    token = TOKENIZER.token_to_id("日本 ")
    result, found, _ = stream([*by_bytes("x"), token], ("本",))
    assert (result.text, found) == ("x日", "本")


def test_what_came_before_min_tokens_is_no_part_of_a_stop_string():
    result = TextStream(TOKENS, ("ab",))
    ids = by_bytes("ababab")
    pushed = [result.push(token, may_stop=number >= 3) for number, token in enumerate(ids)]
    assert pushed == [None] * 5 + ["ab"]
    assert result.text == "abab"


def test_without_a_tokenizer_the_text_is_empty():
    result = TextStream(None)
    assert result.push(5) is None
    assert (result.text, result.piece) == ("", "")
    with pytest.raises(InflashError, match="stop_token_ids"):
        TextStream(None, ("a",))


def test_another_kind_of_tokenizer_is_refused_by_name():
    tokenizer = make_tokenizer()
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InflashError, match=r"ByteLevel.*found Metaspace"):
        TokenBytes(tokenizer)


def test_a_token_costs_the_same_in_a_long_text():
    """Two hundred thousand bytes of text are not copied to look for a stop string in the last few."""
    result, ids = TextStream(TOKENS, ("never in it",)), by_bytes("some text ") * 100
    for _ in range(200):
        for token in ids:
            result.push(token)
    tracemalloc.start()
    try:
        for token in ids[:100]:
            result.push(token)
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()
