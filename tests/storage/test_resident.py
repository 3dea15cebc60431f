from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import flip_byte, fresh_seed

from inflash.errors import InflashError
from inflash.storage import resident, resident_reader
from inflash.storage.layout import DTYPES, TensorSpec
from inflash.storage.resident import byte_ranges, load_tensors, pieces, save_tensors
from inflash.storage.resident_reader import read_tensors

LIMIT = 2000
READERS = pytest.mark.parametrize("read", [load_tensors, read_tensors], ids=["orbax", "direct"])
SPECS = (
    TensorSpec(name="small", shape=(7,), dtype="float32"),
    TensorSpec(name="tall", shape=(90, 33), dtype="bfloat16"),  # 5,940 bytes: four pieces, the last of them shared
    TensorSpec(name="wide", shape=(3, 700), dtype="float32"),  # every row is over the limit
    TensorSpec(name="last", shape=(2, 3), dtype="float16"),
)


def random_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(fresh_seed())
    return {spec.name: rng.standard_normal(spec.shape).astype(DTYPES[spec.dtype]) for spec in SPECS}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """A group cut into many checkpoints, and its tensors."""
    monkeypatch.setattr(resident.pieces, "__defaults__", (LIMIT,))
    tensors = random_tensors()
    save_tensors(tmp_path / "group", SPECS, tensors.__getitem__)
    return tmp_path / "group", tensors


SPEC = st.builds(
    lambda rows, columns, dtype, name: TensorSpec(name=name, shape=(rows, *columns), dtype=dtype),
    st.integers(1, 60),
    st.one_of(st.just(()), st.tuples(st.integers(1, 50))),
    st.sampled_from(sorted(DTYPES)),
    st.text("abc", min_size=1),
)


@given(specs=st.lists(SPEC, min_size=1, max_size=6, unique_by=lambda spec: spec.name), limit=st.integers(1, 3000))
def test_pieces_cover_every_row_once_in_order_and_keep_the_limit(specs: list[TensorSpec], limit: int) -> None:
    cut = pieces(specs, limit)
    rows = [(piece.spec.name, row) for checkpoint in cut for piece in checkpoint for row in range(piece.start, piece.stop)]
    assert rows == [(spec.name, row) for spec in specs for row in range(spec.shape[0])]
    for checkpoint in cut:
        assert checkpoint
        row_bytes = checkpoint[0].nbytes // checkpoint[0].shape[0]
        assert sum(piece.nbytes for piece in checkpoint) <= max(limit, row_bytes)
        assert len({piece.spec.name for piece in checkpoint}) == len(checkpoint)  # the leaves of a checkpoint have one name each


@READERS
@pytest.mark.parametrize("verify", [False, True])
def test_tensors_come_back_bit_for_bit(
    written: tuple[Path, dict[str, np.ndarray]], read, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_reader, "_BLOCK_BYTES", 500)
    folder, tensors = written
    assert sum(path.is_dir() for path in folder.iterdir()) == len(pieces(SPECS, LIMIT)) == 8
    found = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    for piece, rows in read(folder, SPECS, verify=verify):
        assert rows.dtype == DTYPES[piece.spec.dtype] and rows.shape == piece.shape
        found[piece.spec.name][piece.start : piece.stop] = rows
    assert {name: tensor.tobytes() for name, tensor in found.items()} == {name: t.tobytes() for name, t in tensors.items()}


def test_byte_ranges_lead_to_the_bytes(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, tensors = written
    for name, tensor in tensors.items():
        ranges = byte_ranges(folder, SPECS, name)
        found = bytearray(tensor.nbytes)
        for r in ranges:
            with r.file.open("rb") as stream:
                stream.seek(r.offset)
                found[r.target : r.target + r.length] = stream.read(r.length)
        assert bytes(found) == tensor.tobytes()
        assert sum(r.length for r in ranges) == tensor.nbytes
    assert len(byte_ranges(folder, SPECS, "tall")) > 1


def test_each_tensor_is_asked_for_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident.pieces, "__defaults__", (LIMIT,))
    tensors, asked = random_tensors(), []
    save_tensors(tmp_path / "group", SPECS, lambda name: asked.append(name) or tensors[name])
    assert asked == [spec.name for spec in SPECS]


def test_tensors_are_cast_to_their_specs(tmp_path: Path) -> None:
    values = np.random.default_rng(fresh_seed()).standard_normal((4, 4))
    spec = TensorSpec(name="matrix", shape=(4, 4), dtype="bfloat16")
    save_tensors(tmp_path / "group", (spec,), lambda name: values)
    ((_, found),) = load_tensors(tmp_path / "group", (spec,))
    assert found.tobytes() == values.astype(ml_dtypes.bfloat16).tobytes()


def test_a_tensor_of_another_shape_is_not_written(tmp_path: Path) -> None:
    spec = TensorSpec(name="matrix", shape=(4, 4), dtype="float32")
    with pytest.raises(InflashError, match=r"matrix: expected shape \(4, 4\), found \(4, 5\)"):
        save_tensors(tmp_path / "group", (spec,), lambda name: np.zeros((4, 5), np.float32))


@READERS
def test_a_missing_group(tmp_path: Path, read) -> None:
    with pytest.raises(InflashError, match=r"group/0: expected an Orbax checkpoint, found none; is the store whole\?"):
        next(read(tmp_path / "group", SPECS))


@pytest.mark.parametrize(
    "other",
    [{"shape": (4, 5)}, {"dtype": "float16"}, {"dtype": "uint8"}, {"name": "another"}],
    ids=["shape", "dtype", "bytes", "name"],
)
@READERS
def test_what_contradicts_the_specs_is_refused(tmp_path: Path, other: dict, read) -> None:
    spec = {"name": "matrix", "shape": (4, 4), "dtype": "float32"}
    save_tensors(tmp_path / "group", (TensorSpec(**spec),), lambda name: np.zeros((4, 4), np.float32))
    with pytest.raises(InflashError, match=r"group/0: (matrix|another|this Orbax).* (expected .* found|cannot be read)"):
        list(read(tmp_path / "group", (TensorSpec(**{**spec, **other}),)))


@pytest.mark.parametrize("damage", ["metadata", "leaf"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    spec = TensorSpec(name="matrix", shape=(4, 4), dtype="float32")
    save_tensors(tmp_path / "group", (spec,), lambda name: np.ones((4, 4), np.float32))
    file = tmp_path / "group/0" / ("_METADATA" if damage == "metadata" else "matrix/zarr.json")
    file.write_text("{")
    for read in (load_tensors, read_tensors)[: 1 if damage == "metadata" else 2]:  # without Orbax its own file does not matter
        with pytest.raises(InflashError, match=r"group/0: this Orbax checkpoint cannot be read"):
            list(read(tmp_path / "group", (spec,)))


def test_a_flipped_bit_is_found_when_asked_to_verify(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, _ = written
    last = byte_ranges(folder, SPECS, "tall")[-1]
    flip_byte(last.file, last.offset + last.length - 1)
    assert len(list(load_tensors(folder, SPECS))) == 8 + 1  # one checkpoint holds the ends of two tensors
    for read in (load_tensors, read_tensors):
        with pytest.raises(InflashError, match=r"group/3/tall: expected checksum .*; the store is damaged"):
            list(read(folder, SPECS, verify=True))
