import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_neurons

from inflash.errors import InflashError
from inflash.pipeline import store_copy
from inflash.pipeline.store_copy import local_copy


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_node_has_one_copy_however_many_come_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    store, _ = write_neurons(tmp_path / "shared" / "store")
    copies, found, real = [], [], store_copy.shutil.copytree

    def counting(*arguments: Any, **options: Any) -> Any:  # it calls itself for what lies below
        copies.extend([store.path] if arguments and arguments[0] == store.path else [])
        return real(*arguments, **options)

    monkeypatch.setattr(store_copy.shutil, "copytree", counting)
    threads = [
        threading.Thread(target=lambda: found.append(local_copy(store.path, tmp_path / "node" / "flash"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [tmp_path / "node" / "flash" / "store"] * 4
    assert len(copies) == 1
    assert content(found[0]) == content(store.path)
    assert sorted(entry.name for entry in found[0].parent.iterdir()) == [".store.lock", "store"]


def test_an_interrupted_copy_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = write_neurons(tmp_path / "store")

    def full(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "zarr.json").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_copy.shutil, "copytree", full)
        with pytest.raises(InflashError, match=r"cannot be copied to .*: No space left on device"):
            local_copy(store.path, tmp_path / "node")
    assert [entry.name for entry in (tmp_path / "node").iterdir()] == [".store.lock"]
    assert content(local_copy(store.path, tmp_path / "node")) == content(store.path)


def test_what_a_killed_copy_left_is_removed(tmp_path: Path) -> None:
    store, _ = write_neurons(tmp_path / "store")
    for left in (".store.4711.tmp", ".store.4712.tmp"):
        (tmp_path / "node" / left).mkdir(parents=True)
        (tmp_path / "node" / left / "half").write_bytes(b"x")
    local_copy(store.path, tmp_path / "node")
    assert sorted(entry.name for entry in (tmp_path / "node").iterdir()) == [".store.lock", "store"]


def test_another_store_of_the_same_name_is_not_taken_for_it(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, _ = write_neurons(tmp_path / "a" / "store")
    other, _ = write_neurons(tmp_path / "b" / "store", d_ff=256)
    local_copy(first.path, tmp_path / "node")
    with pytest.raises(InflashError, match="is another store than"):
        local_copy(other.path, tmp_path / "node")


def test_what_is_no_store_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InflashError):
        local_copy(tmp_path / "folder", tmp_path / "node")
    assert not (tmp_path / "node").exists()
