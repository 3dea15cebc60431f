"""What the documents say runs: the reader of format.md, the example files, every command line and every link."""

import ast
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opt_checkpoints import write_opt_checkpoint

import inflash
from inflash.pipeline.batch_file import read_batch
from inflash.storage.checkpoint import open_source
from inflash.storage.convert import convert
from inflash.storage.layout import resident_layers, resident_specs
from inflash.storage.predictor_layout import PredictorInfo, predictor_specs
from inflash.storage.store import Store
from inflash.tools import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FORMAT = ROOT / "docs" / "format.md"

pytestmark = pytest.mark.filterwarnings("ignore:.*direct I/O is refused:RuntimeWarning")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def store_of(folder: Path, **checkpoint: Any) -> tuple[Store, dict[str, np.ndarray]]:
    seed = int(np.random.default_rng().integers(2**31))
    tensors = write_opt_checkpoint(folder / "source", seed=seed, **checkpoint)
    with open_source(folder / "source") as source:
        return convert(source, folder / "store"), tensors


def documented_reader() -> dict[str, Any]:
    (code,) = blocks(FORMAT, "python")
    assert not re.search(r"\b(inflash\.|zarr\.open|import (zarr|inflash))", code)
    names: dict[str, Any] = {}
    exec(compile(code, str(FORMAT), "exec"), names)
    return names


@pytest.mark.parametrize(("variant", "dtype"), [("odd", "bfloat16"), ("untied", "float16"), ("350m", "float32")])
def test_the_reader_of_the_format_page_reads_neurons(tmp_path: Path, variant: str, dtype: str) -> None:
    store, tensors = store_of(tmp_path, variant=variant, dtype=dtype)
    read_neuron = documented_reader()["read_neuron"]
    for layer in range(store.config.num_layers):
        neuron = int(np.random.default_rng().integers(store.config.d_ff))
        up, down = read_neuron(store.path, layer, neuron)
        prefix = f"model.decoder.layers.{layer}."
        np.testing.assert_array_equal(up, tensors[f"{prefix}fc1.weight"][neuron].astype(np.float32))
        np.testing.assert_array_equal(down, tensors[f"{prefix}fc2.weight"][:, neuron].astype(np.float32))


@pytest.mark.parametrize("place", ["bundle", "index"])
def test_the_reader_of_the_format_page_notices_a_flipped_bit(tmp_path: Path, place: str) -> None:
    store, _ = store_of(tmp_path)
    neuron = int(np.random.default_rng().integers(store.config.d_ff))
    shard = store.path / "ffn" / "1" / "bundles" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    at = neuron * store.bundles.bundle_bytes if place == "bundle" else len(content) - 5
    content[at] ^= 1
    shard.write_bytes(content)
    with pytest.raises(AssertionError, match="damaged"):
        documented_reader()["read_neuron"](store.path, 1, neuron)


def test_the_format_page_describes_the_files_that_there_are(tmp_path: Path) -> None:
    store, _ = store_of(tmp_path, variant="odd", dtype="bfloat16")
    config, itemsize = store.config, 2
    layer = store.path / "ffn" / "0"
    size = config.d_ff * (config.num_parts * config.d_model * itemsize + 16) + 4
    assert (layer / "bundles" / "c" / "0" / "0" / "0").stat().st_size == size
    for name in ("checksums", "neuron_order"):
        assert (layer / name / "c" / "0").stat().st_size == 4 * config.d_ff + 16 + 4
    for folder in ("resident", "predictors", "tokenizer"):
        assert (store.path / folder).is_dir() and not (store.path / folder / "zarr.json").exists()
    inner = documented_reader()["inner_chunk"]
    qkv = np.frombuffer(inner(store.resident_folder(0) / "0" / "qkv", 0), "<u2")
    (rows,) = [rows for piece, rows in store.load_resident(0) if piece.spec.name == "qkv"]
    np.testing.assert_array_equal(qkv, rows.view(np.uint16).ravel())


def test_the_example_of_root_attributes_is_that_of_such_a_store(tmp_path: Path) -> None:
    store, _ = store_of(tmp_path, variant="odd", dtype="bfloat16")
    (example,) = blocks(FORMAT, "json")
    expected, found = json.loads(example), json.loads((store.path / "zarr.json").read_text())
    found["attributes"]["inflash"]["source"] = expected["attributes"]["inflash"]["source"]
    assert found == expected


@pytest.mark.parametrize("variant", ["350m", "untied"])
def test_the_format_page_names_every_tensor(tmp_path: Path, variant: str) -> None:
    write_opt_checkpoint(tmp_path, variant=variant)
    with open_source(tmp_path) as source:
        specs = [spec for layer in resident_layers(source.config) for spec in resident_specs(source.config, layer, "float32")]
        low_rank = PredictorInfo(kind="low_rank", method="svd", ranks=(8,) * source.config.num_layers)
        signs = PredictorInfo(kind="sign_bits", method="sign_bits")
        specs += [spec for info in (low_rank, signs) for spec in predictor_specs(source.config, info, 0)]
        keys = {**source.config.to_json(), **low_rank.to_json()}
    text = FORMAT.read_text()
    assert not [name for name in (*(spec.name for spec in specs), *keys) if f"`{name}`" not in text]


def test_the_readme_s_batch_file_is_sound(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "README.md", "json")
    (tmp_path / "requests.jsonl").write_text(example)
    with read_batch(tmp_path / "requests.jsonl") as batch:
        assert [request.custom_id for request in batch] == ["sea", "hill"]


def test_the_readme_s_python_imports_what_there_is() -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    names = [
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.module == "inflash"
        for alias in node.names
    ]  # fmt: skip
    assert names and set(names) <= set(inflash.__all__)


def command_lines() -> list[tuple[str, str]]:
    """Lines of code that are whole commands: not the table of cli.md, whose words are placeholders."""
    lines = []
    for path in DOCUMENTS:
        code = "".join(blocks(path, "sh")) + "\n".join(re.findall(r"^    (inflash .*)$", path.read_text(), re.MULTILINE))
        lines += [(path.name, line) for line in code.splitlines() if line.startswith("inflash ")]
    return lines


@pytest.mark.parametrize(("document", "line"), command_lines())
def test_commands_parse(document: str, line: str) -> None:
    assert cli.build_parser().parse_args(shlex.split(line)[1:]).module, document


def test_the_comparison_with_accelerate_explains_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs torch runs in another interpreter; here its help is read, and what it says where no limit can be made."""
    main = runpy.run_path(str(ROOT / "examples" / "accelerate_offload.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["accelerate_offload.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "HF_PYTHON" in capsys.readouterr().out
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["accelerate_offload.py", "model", "--python", "python", "--memory-limit", "1GiB"])
    assert main() == 2
    assert capsys.readouterr().err == "the comparison needs a memory cgroup, found none: only root may make cgroups\n"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()) if "://" not in target]
    assert not [target for target in targets if not (path.parent / target).exists()]
