import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from opt_checkpoints import write_opt_checkpoint
from safetensors.numpy import load_file, save_file

from inflash.errors import InflashError
from inflash.storage import weight_files
from inflash.storage.checkpoint import open_source
from inflash.storage.weight_files import open_weight_files


def fresh_seed() -> int:
    return int(np.random.default_rng().integers(1 << 31))


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of a single-file checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 4])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: str, shards: int) -> None:
    tensors = write_opt_checkpoint(tmp_path, dtype=dtype, shards=shards, seed=fresh_seed())
    weights = open_weight_files(tmp_path)
    assert weights.file_of.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = weights.read(name)
        assert weights.shape(name) == tensor.shape
        assert weights.dtype(name) == dtype
        assert read.dtype == tensor.dtype
        assert read.tobytes() == tensor.tobytes()


@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 20])
def test_parts_of_a_tensor_equal_numpys(tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng()
    tensor = rng.standard_normal((23, 17)).astype(np.float32)
    save_file({"matrix": tensor, "vector": tensor[0].copy()}, tmp_path / "model.safetensors")
    weights = open_weight_files(tmp_path)
    for _ in range(20):
        rows, columns = (slice(*sorted(rng.integers(0, limit + 1, 2).tolist())) for limit in tensor.shape)
        np.testing.assert_array_equal(weights.read("matrix", rows, columns), tensor[rows, columns])
        np.testing.assert_array_equal(weights.read("matrix", rows), tensor[rows])
        np.testing.assert_array_equal(weights.read("matrix", columns=columns), tensor[:, columns])
        np.testing.assert_array_equal(weights.read("vector", columns), tensor[0][columns])


def test_reading_needs_little_more_memory_than_the_result(tmp_path: Path) -> None:
    rows, width, tensors = 8192, 4096, 3  # 128 MiB each
    for number in range(tensors):
        save_file({f"w{number}": np.full((rows, width), number, np.float32)}, tmp_path / f"part{number}.safetensors")
    weight_map = {f"w{number}": f"part{number}.safetensors" for number in range(tensors)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    program = f"""
import re
from pathlib import Path
from inflash.storage.weight_files import open_weight_files

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

weights = open_weight_files(Path({str(tmp_path)!r}))
before = peak_kib()
for name in weights.file_of:
    for start in range(0, {width}, 1024):
        weights.read(name, columns=slice(start, start + 1024))
columns = peak_kib()
for name in weights.file_of:
    weights.read(name)
print(columns - before, peak_kib() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    columns_kib, whole_kib = map(int, done.stdout.split())
    assert columns_kib < (32 + 200) << 10  # the result, and a block of the file mapped and copied
    assert whole_kib < (128 + 200) << 10


def test_no_file_stays_open(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path, shards=3)
    with open_source(tmp_path) as source:
        source.resident_tensor("qkv", 1)
        source.neuron_rows(0, 3, 9)
        opened = [
            os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
        ]
        mapped = Path("/proc/self/maps").read_text()
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    assert str(tmp_path) not in mapped


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(InflashError, match=r"nowhere: no such directory"):
        open_source(tmp_path / "nowhere")


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InflashError, match="found a file"):
        open_source(tmp_path / "model.safetensors")


def test_missing_config(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InflashError, match=r"no config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", '{"a": 1', "\ud800".encode("utf-16", "surrogatepass").decode("latin-1")])
def test_malformed_config(tmp_path: Path, text: str) -> None:
    write_opt_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InflashError, match=r"config\.json: expected"):
        open_source(tmp_path)


def test_missing_weights(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InflashError, match=r"expected weights in model\.safetensors.*found none"):
        open_source(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.01, 0.5, 0.999])
def test_truncated_shard_is_named(tmp_path: Path, share: float) -> None:
    write_opt_checkpoint(tmp_path, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(shard, int(shard.stat().st_size * share))
    with pytest.raises(InflashError, match=r"model-00002-of-00002\.safetensors: not a whole safetensors file"):
        open_source(tmp_path)


def test_corrupt_header_is_named(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[:40] = os.urandom(40)
    file.write_bytes(content)
    with pytest.raises(InflashError, match=r"model\.safetensors: not a whole safetensors file"):
        open_source(tmp_path)


def test_truncation_after_opening_is_an_error(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path)
    with open_source(tmp_path) as source:
        os.truncate(tmp_path / "model.safetensors", 5000)
        with pytest.raises(InflashError, match="not a whole safetensors file"):
            source.resident_tensor("tokens", None)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InflashError, match=r"names the shard 'model-00002-of-00003\.safetensors', which is missing"):
        open_source(tmp_path)


def test_shard_without_its_tensor(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.decoder.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(InflashError, match=r"model-00002-of-00002.*embed_tokens\.weight is missing, although"):
        open_source(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": "../model.safetensors"}, {"a": ".."}, {"a": ""}])
def test_malformed_index(tmp_path: Path, weight_map: object) -> None:
    write_opt_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InflashError, match=r"model\.safetensors\.index\.json: (weight_map should|names the shard)"):
        open_source(tmp_path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.decoder.layers.1.fc2.bias"))
    with pytest.raises(InflashError, match=r"tensor model\.decoder\.layers\.1\.fc2\.bias is missing"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["layers.0.fc1.weight", "layers.2.self_attn.k_proj.weight", "layers.1.fc2.bias"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "float64", "int32"])
def test_unsupported_dtype_names_the_tensor(tmp_path: Path, name: str, dtype: str) -> None:
    write_opt_checkpoint(tmp_path)
    key = f"model.decoder.{name}"
    rewrite(tmp_path, lambda tensors: tensors.update({key: tensors[key].astype(dtype)}))
    with pytest.raises(InflashError, match=f"tensor {key} should be one of bfloat16, float16, float32, found"):
        open_source(tmp_path)


def test_many_shards_need_few_file_descriptors(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path, shards=20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, hard))
    try:
        with open_source(tmp_path) as source:
            assert source.neuron_rows(2, 0, 256).shape == (256, 2, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_torch_checkpoint(folder: Path, shards: int, dtype: str) -> None:
    """The same checkpoint as write_opt_checkpoint's, in PyTorch's format."""
    torch = pytest.importorskip("torch", reason="PyTorch is an optional extra")
    tensors = write_opt_checkpoint(folder, variant="350m", dtype=dtype, seed=5)
    (folder / "model.safetensors").unlink()
    state = {name: torch.from_numpy(tensor.astype(np.float32)).to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for shard in range(shards):
        part = dict(list(state.items())[shard::shards])
        torch.save(part, folder / f"pytorch_model-{shard}.bin")
        weight_map.update(dict.fromkeys(part, f"pytorch_model-{shard}.bin"))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_torch_files_read_like_safetensors(tmp_path: Path, shards: int, dtype: str) -> None:
    write_torch_checkpoint(tmp_path / "torch", shards, dtype)
    write_opt_checkpoint(tmp_path / "safetensors", variant="350m", dtype=dtype, seed=5)
    with open_source(tmp_path / "torch") as ours, open_source(tmp_path / "safetensors") as expected:
        assert ours.dtype == expected.dtype == dtype
        for name, layer in (("tokens", None), ("project_out", None), ("qkv", 2), ("up_bias", 0)):
            assert ours.resident_tensor(name, layer).tobytes() == expected.resident_tensor(name, layer).tobytes()
        assert ours.neuron_rows(1, 30, 77).tobytes() == expected.neuron_rows(1, 30, 77).tobytes()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "pickled code", "list"])
def test_damaged_or_unsafe_torch_file(tmp_path: Path, damage: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is an optional extra")
    write_torch_checkpoint(tmp_path, 1, "float32")
    file = tmp_path / "pytorch_model.bin"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "list":
        torch.save([torch.zeros(2)], file)
    elif damage == "pickled code":
        torch.save({"x": Path.unlink}, file)
    else:
        file.write_bytes(b"" if damage == "empty" else b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InflashError, match=r"pytorch_model\.bin: (PyTorch cannot load it|expected a dict)"):
        open_source(tmp_path)


def test_torch_file_without_torch_tells_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_opt_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InflashError, match=r"pip install 'inflash\[torch\]'"):
        open_source(tmp_path)
