import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from inflash.errors import InflashError
from inflash.storage.tokenizer_files import copy_tokenizer

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
TEXTS = ["Hello, world!", " two  spaces\nand\ttabs", "naïve café 東京 🙂", "", "def f(x):\n    return x + 1"]


def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def write_two_files(folder: Path, **config) -> Tokenizer:
    """vocab.json, merges.txt and config.json as the Hub's OPT has them; returns the tokenizer they describe (without BOS)."""
    tokenizer = trained()
    tokenizer.model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "opt", "bos_token_id": 2, "eos_token_id": 2, **config}))
    return tokenizer


def copied(source: Path, destination: Path) -> Tokenizer:
    assert copy_tokenizer(source, destination) is True
    return Tokenizer.from_file(str(destination / "tokenizer.json"))


def test_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "a" / "destination"
    source.mkdir()
    trained().save(str(source / "tokenizer.json"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).write_text(json.dumps({"name": name}, indent=7))
    (source / "model.safetensors").write_bytes(b"not this one")
    assert copy_tokenizer(source, destination) is True
    assert {file.name for file in destination.iterdir()} == {file.name for file in source.iterdir()} - {"model.safetensors"}
    for file in destination.iterdir():
        assert file.read_bytes() == (source / file.name).read_bytes()


def test_built_from_vocabulary_and_merges(tmp_path: Path) -> None:
    plain = write_two_files(tmp_path)
    built = copied(tmp_path, tmp_path / "out")
    for text in TEXTS:
        ids = built.encode(text).ids
        assert ids == [2, *plain.encode(text).ids]
        assert built.decode(ids) == text
        assert built.encode(text, add_special_tokens=False).ids == ids[1:]


def test_special_tokens_in_a_text_are_recognised(tmp_path: Path) -> None:
    write_two_files(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>", "special": True}}))
    built = copied(tmp_path, tmp_path / "out")
    assert built.encode("Hello</s><pad>").ids == [2, *built.encode("Hello", add_special_tokens=False).ids, 2, 1]


@pytest.mark.parametrize(
    ("model_type", "settings", "starts_with"),
    [
        ("opt", {}, 2),
        ("opt", {"add_bos_token": False}, None),
        ("opt", {"add_bos_token": True, "bos_token": "<s>"}, 0),
        ("opt", {"add_bos_token": True, "bos_token": {"content": "<unk>", "__type": "AddedToken"}}, 3),
        ("gpt2", {}, None),
        ("gpt2", {"add_bos_token": True}, 2),
    ],
)
def test_which_token_starts_a_text(tmp_path: Path, model_type: str, settings: dict, starts_with: int | None) -> None:
    plain = write_two_files(tmp_path, model_type=model_type)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = copied(tmp_path, tmp_path / "out").encode("Hello").ids
    assert ids == ([] if starts_with is None else [starts_with]) + plain.encode("Hello").ids


def test_prefix_space(tmp_path: Path) -> None:
    plain = write_two_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert copied(tmp_path, tmp_path / "out").encode("Hello").ids == [2, *plain.encode(" Hello").ids]


def test_a_chat_template_comes_along(tmp_path: Path) -> None:
    write_two_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}\n")
    copied(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}\n"


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert copy_tokenizer(tmp_path, tmp_path / "out") is False
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_one_file_of_two(tmp_path: Path, missing: str) -> None:
    write_two_files(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(InflashError, match=f"found no {missing}"):
        copy_tokenizer(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.json", "{"),
        ("vocab.json", "[1, 2]"),
        ("vocab.json", '{"a": "b"}'),
        ("merges.txt", "#version: 0.2\nnot in vocabulary at all\n"),
        ("merges.txt", "#version: 0.2\nzzz qqq\n"),
        ("generation_config.json", "{'a': 1}"),
        ("tokenizer_config.json", '{"bos_token": 3}'),
        ("config.json", "null"),
    ],
)
def test_malformed_files_write_nothing(tmp_path: Path, name: str, text: str) -> None:
    write_two_files(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InflashError, match=name.partition(".")[0]):
        copy_tokenizer(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_start_token_that_is_not_in_the_vocabulary(tmp_path: Path) -> None:
    write_two_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|start|>"}')
    with pytest.raises(InflashError, match=r"bos_token should be one of the \d+ tokens of vocab\.json, found '<\|start\|>'"):
        copy_tokenizer(tmp_path, tmp_path / "out")


def test_several_ends_of_text_in_the_config(tmp_path: Path) -> None:
    plain = write_two_files(tmp_path, eos_token_id=[2, 3])
    assert copied(tmp_path, tmp_path / "out").encode("Hello").ids == [2, *plain.encode("Hello").ids]
