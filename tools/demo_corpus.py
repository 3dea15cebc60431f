"""The text that the embedded model learns from: the source of Python's own standard library.

Every machine with Python has it, so anyone can repeat the training. Test modules are held out for validation.
"""

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..errors import InflashError

BOS, PAD, EOS, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"  # the ids 0 to 3, in OPT's order

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# Tables of character codes and of help topics: not code that anyone would want completed.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "lib-dynload"})


def source_files(held_out: bool) -> list[Path]:
    """The standard library's modules, sorted by path.

    Args:
      held_out: True for the test modules (validation), False for all the others (training).

    Raises:
      InflashError: this Python came without them (some distributions package the tests apart).
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if _LEFT_OUT.isdisjoint(parts) and (not _TEST_FOLDERS.isdisjoint(parts)) == held_out:
            files.append(path)
    if len(files) < 100:
        wanted = "test modules" if held_out else "modules"
        raise InflashError(
            f"{library}: expected the standard library's {wanted}, found {len(files)} files; "
            "train with a Python that was installed whole"
        )
    return files


def held_out_half(part: str) -> list[Path]:
    """Half of the held-out modules: those that the embedded predictor is trained on ("predictor"), or the rest ("judging").

    Which half a module is in follows from its path, so that other versions of Python, with other modules, do not mix the halves.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    wanted = {"predictor": 0, "judging": 1}[part]

    def half(file: Path) -> int:
        return zlib.crc32(file.relative_to(library).as_posix().encode()) % 2

    return [file for file in source_files(held_out=True) if half(file) == wanted and _text(file) is not None]


def texts(held_out: bool) -> Iterator[str]:
    """Yields each file's text, undecodable files (there are some in the tests) left out."""
    for path in source_files(held_out):
        if (text := _text(path)) is not None:
            yield text


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer in OPT's conventions: `</s>` starts every text and separates texts."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, PAD, EOS, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(held_out=False), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{EOS} $A", pair=f"{EOS} $A {EOS} $B", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return tokenizer
