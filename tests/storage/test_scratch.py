"""Arrays on disk while a job runs. Axes: W windows, C tokens of a window, D d_model, F d_ff."""

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import fresh_seed

from inflash.storage.scratch import BitArray, WindowArray

SHAPE = (7, 5, 12)
FLOATS = ("float32", "bfloat16")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(fresh_seed()).standard_normal(shape).astype(np.float32)


def top_half(values: np.ndarray) -> np.ndarray:
    """Float32 values cut to what bfloat16 can hold, bit by bit."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_come_back_bitwise(tmp_path: Path, dtype: str) -> None:
    values = top_half(normal(*SHAPE))
    values[3, 1, :3] = np.inf, -0.0, -np.inf
    array = WindowArray(tmp_path / "array", SHAPE, dtype, create=True)
    array.write(0, values)
    found = array.read(0, 7)
    assert array.shape == SHAPE
    assert found.dtype == np.float32
    assert found.tobytes() == values.tobytes()


def test_bfloat16_rounds_to_the_nearest_and_takes_half_the_space(tmp_path: Path) -> None:
    values, sizes = normal(*SHAPE), {}
    for dtype in FLOATS:
        array = WindowArray(tmp_path / dtype, SHAPE, dtype, create=True)
        array.write(0, values)
        sizes[dtype] = sum(file.stat().st_size for file in (tmp_path / dtype / "c").rglob("*") if file.is_file())
    assert sizes == {"float32": values.nbytes, "bfloat16": values.nbytes // 2}
    found = WindowArray(tmp_path / "bfloat16", SHAPE, "bfloat16", create=True).read(0, 7)
    below = top_half(values)
    above = (below.view(np.uint32) + np.uint32(1 << 16)).view(np.float32)  # the next one away from zero
    nearest = np.minimum(np.abs(values.astype(np.float64) - below), np.abs(values.astype(np.float64) - above))
    np.testing.assert_array_equal(np.abs(values.astype(np.float64) - found), nearest)
    assert (found != values).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_windows_are_written_in_any_order_and_again(tmp_path: Path, dtype: str) -> None:
    """Also with an array opened anew for each write, and with float64 and bfloat16 values given."""
    values = top_half(normal(*SHAPE))
    for first, last in ((5, 7), (0, 2), (2, 5)):
        WindowArray(tmp_path / "array", SHAPE, dtype, create=True).write(first, values[first:last].astype(np.float64))
    array = WindowArray(tmp_path / "array", SHAPE, dtype, create=True)
    values[1:3] *= -1
    array.write(1, values[1:3].astype(ml_dtypes.bfloat16))
    again = WindowArray(tmp_path / "array", SHAPE, dtype, create=True)
    np.testing.assert_array_equal(again.read(0, 7), values)
    np.testing.assert_array_equal(again.read(2, 6), values[2:6])
    np.testing.assert_array_equal(again.read(6, 7), values[6:])


def test_what_was_not_written_does_not_change_what_was(tmp_path: Path) -> None:
    values = normal(2, 5, 12)
    array = WindowArray(tmp_path / "array", SHAPE, "float32", create=True)
    array.write(3, values)
    np.testing.assert_array_equal(array.read(3, 5), values)
    np.testing.assert_array_equal(array.read(5, 7), 0)
    bits = BitArray(tmp_path / "bits", (4, 3, 7), create=True)
    bits.write(2, values[:1, :3, :7] > 0)
    np.testing.assert_array_equal(bits.read(2, 3), values[:1, :3, :7] > 0)


@pytest.mark.parametrize("shape", [(3, 5, 12), (4, 1, 1), (3, 3, 3), (2, 7, 9), (2, 4, 16)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_bits_come_back(tmp_path: Path, shape: tuple[int, int, int], share: float) -> None:
    """Whether or not C * F is a multiple of eight; all and none among them."""
    values = np.random.default_rng(fresh_seed()).random(shape) < share
    array = BitArray(tmp_path / "bits", shape, create=True)
    array.write(0, values)
    found = BitArray(tmp_path / "bits", shape, create=True).read(0, shape[0])
    assert array.shape == shape
    assert found.dtype == bool
    np.testing.assert_array_equal(found, values)


def test_bits_are_read_that_were_written_as_columns(tmp_path: Path) -> None:
    """Not contiguous in memory, as a transposed or cut array is."""
    values = np.random.default_rng(fresh_seed()).random((9, 5, 4)) < 0.5
    array = BitArray(tmp_path / "bits", (4, 5, 9), create=True)
    array.write(0, values.T)
    np.testing.assert_array_equal(array.read(0, 4), values.T)


def test_bits_take_an_eighth_of_the_space(tmp_path: Path) -> None:
    """Random ones; others are compressed further."""
    shape = (2, 64, 1000)
    for name, share in (("random", 0.5), ("few", 0.01)):
        BitArray(tmp_path / name, shape, create=True).write(0, np.random.default_rng(fresh_seed()).random(shape) < share)
    sizes = {
        name: sum(file.stat().st_size for file in (tmp_path / name / "c").rglob("*") if file.is_file())
        for name in ("random", "few")
    }
    assert 16_000 <= sizes["random"] <= 16_200
    assert sizes["few"] < 0.3 * sizes["random"]


@settings(max_examples=25)
@given(data=st.data())
def test_any_writes_leave_the_newest_of_each_window(data: st.DataObject) -> None:
    """Floats and bits against arrays in memory."""
    shape = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 11)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 31)))
    expected = top_half(rng.standard_normal(shape).astype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        arrays = {dtype: WindowArray(Path(folder, dtype), shape, dtype, create=True) for dtype in FLOATS}
        bits = BitArray(Path(folder, "bits"), shape, create=True)
        for array in (*arrays.values(), bits):
            array.write(0, expected > 0 if isinstance(array, BitArray) else expected)
        for _ in range(data.draw(st.integers(0, 3))):
            first = data.draw(st.integers(0, shape[0] - 1))
            last = data.draw(st.integers(first + 1, shape[0]))
            expected[first:last] = top_half(rng.standard_normal((last - first, *shape[1:])).astype(np.float32))
            for array in arrays.values():
                array.write(first, expected[first:last])
            bits.write(first, expected[first:last] > 0)
        first = data.draw(st.integers(0, shape[0] - 1))
        for array in arrays.values():
            np.testing.assert_array_equal(array.read(first, shape[0]), expected[first:])
        np.testing.assert_array_equal(bits.read(first, shape[0]), expected[first:] > 0)
