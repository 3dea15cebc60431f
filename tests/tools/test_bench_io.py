"""`inflash bench io`: the disk's curve and the loaders' share of it, on a small file."""

import json
import os
from pathlib import Path

import pytest

from inflash.tools import bench_io
from inflash.tools.bench_io import DEPTHS
from inflash.tools.cli import main


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder where direct reads work."""
    (tmp_path / "probe").write_bytes(bytes(4096))
    try:
        os.close(os.open(tmp_path / "probe", os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"the file system under {tmp_path} refuses direct I/O: {error.strerror}")
    (tmp_path / "probe").unlink()
    return tmp_path


def test_a_folder_is_measured_and_left_as_it_was(
    disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_io, "SIZES", (4096, 16384))
    monkeypatch.setattr(bench_io.shutil, "which", lambda name: None)
    assert main(["bench", "io", str(disk), "--seconds", "0.1", "--file-mib", "8", "--bundle-bytes", "4096"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert [(point["size"], point["depth"]) for point in document["curve"]] == [(s, d) for s in (4096, 16384) for d in DEPTHS]
    assert all(point["bytes_per_s"] > 0 and point["fio_bytes_per_s"] is None for point in document["curve"])
    assert document["loader_bytes_per_s"] > 0 < document["queue_bytes_per_s"]
    assert document["share"] == pytest.approx(document["loader_bytes_per_s"] / document["queue_bytes_per_s"])
    assert document["fio_bytes_per_s"] is None and document["bundle_bytes"] == 4096
    assert "| inflash loaders |" in out and "fio libaio" not in out and "(fio)" not in out
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bundle-bytes", "1000"], "--bundle-bytes: expected a multiple of 1024, found 1000"),
        (["nowhere"], "expected a store or a folder"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    target = str(tmp_path / flags[0]) if flags == ["nowhere"] else str(tmp_path)
    assert main(["bench", "io", target, *(flags if flags != ["nowhere"] else [])]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
