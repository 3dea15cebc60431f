import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from inflash.errors import InflashError
from inflash.pipeline.sampling_params import SamplingParams

VLLM_DEFAULTS = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
}

WRONG = [
    *[("n", value) for value in (0, -1, 129, 1.0, "1", True, None)],
    *[("temperature", value) for value in (-0.1, math.nan, math.inf, "hot", None, True, 10**400)],
    *[("top_p", value) for value in (1.01, -1, math.nan, None)],
    *[("top_k", value) for value in (-2, 1.5, True, 2**31)],
    *[("min_p", value) for value in (-0.01, 1.01, math.nan)],
    *[("seed", value) for value in (1.0, "7", True, 2**64, -(2**63) - 1, 10**5000)],
    *[("stop", value) for value in ("", [""], ["a", ""], ["a", 1], 5, {"a": 1}, {"a"})],
    *[("stop_token_ids", value) for value in (5, [1.0], [-1], ["a"], [True], [2**31], "12")],
    *[("ignore_eos", value) for value in (0, 1, "true", None)],
    *[("max_tokens", value) for value in (0, -1, 1.5, None, "16", math.inf, 2**31)],
    *[("min_tokens", value) for value in (-1, 17, 0.5)],
    *[("logprobs", value) for value in (-1, 21, True, 1.0)],
    *[("repetition_penalty", value) for value in (0, -1, math.inf, 1e-300)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, math.nan, None)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, math.nan)],
    *[
        ("logit_bias", value)
        for value in (5, "5", [5], [(1, 2, 3)], {-1: 1}, {"x": 1}, {"1.0": 1}, {True: 1}, {2**31: 1}, {"٣": 1}, {"9" * 20: 1})
    ],
    *[("logit_bias", value) for value in ({5: 1, "5": 2}, [(5, 1), (5, 2)], dict.fromkeys(range(1025), 1))],
]


def test_names_and_defaults_are_vllm_s():
    assert dataclasses.asdict(SamplingParams()) == VLLM_DEFAULTS
    assert [field.name for field in dataclasses.fields(SamplingParams)] == list(VLLM_DEFAULTS)


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(type(value)) if isinstance(value, int) else None)
def test_a_wrong_value_is_refused_by_name_with_what_was_expected_and_found(name, value):
    with pytest.raises(InflashError, match=rf"^{name} should be .*, found ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 250


def test_values_at_the_edges_are_taken():
    params = SamplingParams(
        n=128,
        temperature=0,
        top_p=0,
        top_k=-1,
        min_p=1,
        seed=-(2**63),
        max_tokens=1,
        min_tokens=1,
        logprobs=0,
        presence_penalty=-2,
    )
    assert params.greedy
    assert isinstance(params.temperature, float)


def test_numpy_numbers_become_python_s():
    numbers: dict[str, Any] = {"temperature": np.float32(0.5), "max_tokens": np.int64(3), "seed": np.uint64(2**64 - 1)}
    params = SamplingParams(**numbers)
    assert (params.temperature, params.max_tokens, params.seed) == (0.5, 3, 2**64 - 1)
    assert type(params.max_tokens) is int


@pytest.mark.parametrize(("stop", "strings"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_strings_are_always_a_tuple(stop, strings):
    assert SamplingParams(stop=stop).stop_strings == strings


@pytest.mark.parametrize("bias", [101, -100.5, math.nan, "1", None, True])
def test_a_wrong_bias_is_refused_with_its_token(bias):
    with pytest.raises(InflashError, match=r"^logit_bias of token 7 should be a number from -100 to 100, found "):
        SamplingParams(logit_bias={5: 100, "7": bias})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("given", [{5: 1, 7: -100}, {"5": 1, "7": -100}, [(5, 1.0), [7, -100]]])
def test_biases_are_kept_as_pairs_and_may_be_given_so(given):
    params = SamplingParams(logit_bias=given)
    assert params.biases == ((5, 1.0), (7, -100.0)) and not params.plain
    assert dataclasses.replace(params, n=2).biases == params.biases
    assert hash(params) == hash(SamplingParams(logit_bias={5: 1, 7: -100}))
    assert SamplingParams(logit_bias={}).biases == () == SamplingParams().biases and SamplingParams(temperature=0).plain


def test_it_is_hashable_and_frozen_with_lists_given():
    params = SamplingParams(stop=["a"], stop_token_ids=[1, 2])
    assert hash(params) == hash(SamplingParams(stop=("a",), stop_token_ids=(1, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_what_a_request_needs_is_told_apart():
    assert not SamplingParams().filtered
    assert not SamplingParams().penalized
    filters: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}]
    assert all(SamplingParams(**one).filtered for one in filters)
    assert not SamplingParams(top_k=-1).filtered
    penalties: list[dict[str, Any]] = [{"repetition_penalty": 1.1}, {"presence_penalty": -0.1}, {"frequency_penalty": 0.1}]
    assert all(SamplingParams(**one).penalized for one in penalties)


def test_defaults_come_from_the_model_where_nothing_is_given():
    config = {"temperature": 0.6, "top_k": None, "top_p": 0.9, "max_new_tokens": 99, "eos_token_id": 2, "do_sample": True}
    command_line, request = {"temperature": 0.1, "seed": 3}, {"seed": 4, "top_p": None}
    params = SamplingParams.from_defaults(config, **{**command_line, **request})
    assert params == SamplingParams(temperature=0.1, seed=4, top_p=0.9, max_tokens=99)


def test_a_given_zero_is_given():
    assert SamplingParams.from_defaults({"temperature": 0.6}, temperature=0).temperature == 0


def test_an_unknown_parameter_is_named():
    with pytest.raises(InflashError, match="unknown max_new_tokens"):
        SamplingParams.from_defaults({}, max_new_tokens=3)


def test_a_fault_of_the_model_s_defaults_is_said_to_be_the_model_s():
    with pytest.raises(InflashError, match=r"generation_config\.json: top_p should be"):
        SamplingParams.from_defaults({"top_p": 7}, top_p=0.5)
