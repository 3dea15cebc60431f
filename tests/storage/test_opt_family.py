import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_logits import golden_prompts, write_golden_checkpoint
from opt_checkpoints import VARIANTS, opt_config, write_opt_checkpoint
from opt_reference import canonical_tensors, forward
from safetensors.numpy import load_file, save_file

from inflash.errors import InflashError
from inflash.storage.checkpoint import open_source
from inflash.storage.families.opt import model_config
from inflash.storage.layout import resident_layers, resident_specs

DECODER = "model.decoder."


def fresh_seed() -> int:
    return int(np.random.default_rng().integers(1 << 31))


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_on_canonical_tensors_equals_transformers(tmp_path: Path, variant: str) -> None:
    write_golden_checkpoint(tmp_path, variant)
    with open_source(tmp_path) as source:
        tensors = canonical_tensors(source)
        for token_ids, expected in golden_prompts(variant):
            np.testing.assert_allclose(forward(tensors, source.config, token_ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_resident_tensor_has_its_specs_shape(tmp_path: Path, variant: str, dtype: str) -> None:
    write_opt_checkpoint(tmp_path, variant=variant, dtype=dtype)
    with open_source(tmp_path) as source:
        assert source.dtype == dtype
        for layer in resident_layers(source.config):
            for spec in resident_specs(source.config, layer, source.dtype):
                tensor = source.resident_tensor(spec.name, layer)
                assert tensor.shape == spec.shape
                assert tensor.dtype.name in (dtype, "float32")
                assert tensor.dtype.name == dtype or variant == "galactica"


def test_fused_projection_is_query_key_value(tmp_path: Path) -> None:
    tensors = write_opt_checkpoint(tmp_path, dtype="bfloat16", seed=fresh_seed())
    attention = f"{DECODER}layers.1.self_attn."
    with open_source(tmp_path) as source:
        for ending, name in (("weight", "qkv"), ("bias", "qkv_bias")):
            stacked = np.concatenate([tensors[f"{attention}{module}_proj.{ending}"] for module in "qkv"])
            np.testing.assert_array_equal(source.resident_tensor(name, 1), stacked)


@pytest.mark.parametrize("variant", ["plain", "odd"])
def test_neuron_rows_are_up_rows_and_down_columns(tmp_path: Path, variant: str) -> None:
    tensors = write_opt_checkpoint(tmp_path, variant=variant, dtype="bfloat16", seed=fresh_seed(), shards=2)
    up, down = (tensors[f"{DECODER}layers.2.{name}.weight"] for name in ("fc1", "fc2"))
    rng = np.random.default_rng()
    with open_source(tmp_path) as source:
        for start, stop in [(0, len(up)), (len(up) - 1, len(up)), sorted(rng.integers(0, len(up), 2).tolist())]:
            rows = source.neuron_rows(2, start, stop)
            assert rows.shape == (stop - start, 2, source.config.d_model)
            assert rows.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(rows[:, 0], up[start:stop])
            np.testing.assert_array_equal(rows[:, 1], down[:, start:stop].T)


def test_mixed_dtypes_are_joined_without_loss(tmp_path: Path) -> None:
    tensors = write_opt_checkpoint(tmp_path, dtype="bfloat16", seed=fresh_seed())
    down, key = f"{DECODER}layers.0.fc2.weight", f"{DECODER}layers.0.self_attn.k_proj.weight"
    tensors[down] = np.random.default_rng().standard_normal(tensors[down].shape).astype(np.float16)
    tensors[key] = np.random.default_rng().standard_normal(tensors[key].shape).astype(np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        assert source.dtype == "bfloat16"
        rows, qkv = source.neuron_rows(0, 5, 50), source.resident_tensor("qkv", 0)
    assert rows.dtype == qkv.dtype == np.float32
    np.testing.assert_array_equal(rows[:, 1], tensors[down][:, 5:50].T.astype(np.float32))
    np.testing.assert_array_equal(rows[:, 0], tensors[f"{DECODER}layers.0.fc1.weight"][5:50].astype(np.float32))
    np.testing.assert_array_equal(np.split(qkv, 3)[1], tensors[key])


@pytest.mark.parametrize("variant", ["plain", "350m", "galactica"])
def test_both_prefixes_and_any_sharding_give_the_same_tensors(tmp_path: Path, variant: str) -> None:
    seed = fresh_seed()
    write_opt_checkpoint(tmp_path / "a", variant=variant, seed=seed)
    write_opt_checkpoint(tmp_path / "b", variant=variant, seed=seed, prefix="decoder.", shards=5)
    with open_source(tmp_path / "a") as a, open_source(tmp_path / "b") as b:
        assert a.config == b.config
        first, second = canonical_tensors(a), canonical_tensors(b)
    for name, tensor in {**first["embeddings"], **first["layers"]["2"]}.items():
        other = second["embeddings"].get(name, second["layers"]["2"].get(name))
        np.testing.assert_array_equal(tensor, other, err_msg=name)


def test_absent_biases_and_norms_are_those_that_change_nothing(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path, variant="galactica", dtype="float16")
    with open_source(tmp_path) as source:
        assert (source.resident_tensor("ffn_norm_scale", 0) == 1).all()
        assert (source.resident_tensor("final_norm_scale", None) == 1).all()
        for name in ("qkv_bias", "attention_out_bias", "up_bias", "down_bias", "attention_norm_bias"):
            assert (source.resident_tensor(name, 1) == 0).all()


def test_a_tied_head_in_the_file_is_left_out(tmp_path: Path) -> None:
    tensors = write_opt_checkpoint(tmp_path)
    save_file({**tensors, "lm_head.weight": tensors[f"{DECODER}embed_tokens.weight"]}, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        assert source.config.tied_head
        assert "head" not in canonical_tensors(source)["embeddings"]


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    tensors = write_opt_checkpoint(tmp_path, variant="untied")
    with open_source(tmp_path) as source:
        np.testing.assert_array_equal(source.resident_tensor("head", None), tensors["lm_head.weight"])
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InflashError, match=r"tensor lm_head\.weight is missing"):
        open_source(tmp_path)


def test_config_of_both_generations_of_transformers() -> None:
    document = opt_config("350m", "float32")
    assert "dtype" in document
    old = {key: value for key, value in document.items() if key != "dtype"} | {"torch_dtype": "float16", "prefix": "</s>"}
    config = model_config(document)
    assert config == model_config(old)
    assert (config.family, config.embed_dim, config.d_model, config.norm_first, config.final_norm) == (
        "opt",
        32,
        64,
        False,
        False,
    )
    assert (config.max_positions, config.position_offset, config.tied_head) == (64, 2, True)


def test_defaults_of_what_configs_leave_out() -> None:
    document = opt_config("plain")
    for key in ("word_embed_proj_dim", "do_layer_norm_before", "_remove_final_layer_norm", "activation_function"):
        del document[key]
    document |= {"pad_token_id": None, "bos_token_id": None}
    config = model_config(document)
    assert (config.embed_dim, config.norm_first, config.final_norm, config.activation) == (64, True, True, "relu")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 2, 1)


def test_removed_final_norm(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path, _remove_final_layer_norm=True)
    with open_source(tmp_path) as source:
        assert source.config.norm_first
        assert not source.config.final_norm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "model_type should be one of opt, found 'bloom'"),
        ({"model_type": None}, "model_type should be one of opt, found None"),
        ({"model_type": ["opt"]}, "model_type should be one of opt"),
        ({"activation_function": "gelu"}, "activation_function should be 'relu', found 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size should be a positive integer, found None"),
        ({"ffn_dim": "256"}, "ffn_dim should be a positive integer, found '256'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers should be a positive integer, found 0"),
        ({"vocab_size": True}, "vocab_size should be a positive integer, found True"),
        ({"num_attention_heads": 5}, "d_model should be a multiple of num_heads, found 64 and 5"),
        ({"do_layer_norm_before": "yes"}, "do_layer_norm_before should be true or false, found 'yes'"),
        ({"eos_token_id": [2, 50118]}, r"eos_token_id should be one token id, found \[2, 50118\]"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict, message: str) -> None:
    write_opt_checkpoint(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InflashError, match=rf"config\.json: .*{message}"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("change", "tensor", "expected", "found"),
    [
        ({"vocab_size": 127}, "embed_tokens.weight", (127, 64), (128, 64)),
        ({"max_position_embeddings": 66}, "embed_positions.weight", (68, 64), (66, 64)),
        ({"ffn_dim": 255}, "layers.0.up_bias|layers.0.fc1.bias", (255,), (256,)),
        ({"word_embed_proj_dim": 32}, "embed_tokens.weight", (128, 32), (128, 64)),
    ],
)
def test_shapes_that_contradict_the_config(tmp_path: Path, change: dict, tensor: str, expected: tuple, found: tuple) -> None:
    write_opt_checkpoint(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InflashError) as caught:
        open_source(tmp_path)
    assert f"{tensor.rpartition('|')[2]} should have shape {expected} by config.json, found {found}" in str(caught.value)


@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight", "self_attn.v_proj.weight", "self_attn.out_proj.bias"])
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    write_opt_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = f"{DECODER}layers.2.{name}"
    tensors[key] = np.ascontiguousarray(tensors[key][:-1])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InflashError, match=f"tensor {key} should have shape"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"num_hidden_layers": 2}, "layers.2.fc1.bias"),
        ({"enable_bias": False}, "layers.0.fc1.bias"),
        ({"layer_norm_elementwise_affine": False}, "final_layer_norm.bias"),
        ({"_remove_final_layer_norm": True}, "final_layer_norm.bias"),
    ],
)
def test_weights_that_the_config_denies(tmp_path: Path, change: dict, tensor: str) -> None:
    write_opt_checkpoint(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InflashError, match=f"tensor {DECODER}{tensor} contradicts config.json"):
        open_source(tmp_path)


def test_what_is_no_weight_of_the_decoder_is_left_alone(tmp_path: Path) -> None:
    tensors = write_opt_checkpoint(tmp_path)
    extra = {f"{DECODER}version": np.zeros(1, np.float32), "score.weight": np.zeros((2, 64), np.int8)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        np.testing.assert_array_equal(source.resident_tensor("tokens", None), tensors[f"{DECODER}embed_tokens.weight"])
