"""What a report says in words, from made-up figures."""

from made_up_profile import profile

from inflash.tools.process_charts import PROCESS_SECTIONS
from inflash.tools.profile_charts import course_text
from inflash.tools.profile_report import facts

ENERGY = PROCESS_SECTIONS[-1]


def test_what_was_run_is_told_in_sizes_and_times() -> None:
    told = dict(facts(profile()))
    assert "3 layers, d_model 1024" in told["model"] and "1024 neurons a layer, 4 KiB each on disk" in told["model"]
    assert told["cache"] == "51 neurons a layer (5 %), 205 KiB a layer, 614 KiB in 3 layers"
    assert "planted (made with the model by `inflash synth`)" in told["predictor"] and "ahead" in told["predictor"]
    assert told["reads"] == "loaders: 1; reads under way at a time: 1 at most; only neurons side by side are read together"
    assert told["start"].startswith("4.2 s") and told["prompt"] == "9 tokens in 1.00 s"
    assert told["decoding"].startswith(
        "40 tokens in 40 steps, 4.6 s, 8.8 tokens a second. A text's first token comes out of its prompt"
    )


def test_what_a_run_did_not_have_is_told_as_well() -> None:
    options = {**profile()["options"], "ffn": "hybrid", "loaders": 2, "merge_gap": 8192}
    told = dict(facts(profile(cache={"share": None}, options=options, predictor=None, start_s=None, token={"steps": 0})))
    assert told["cache"] == "none: --ffn hybrid" and told["predictor"].startswith("none") and "loaders: 2" in told["reads"]
    assert "up to 8 KiB apart are read together" in told["reads"] and not {"start", "decoding"} & set(told)
    assert "4 texts were decoded together" in dict(facts(profile(sequences=4.0)))["decoding"]
    many = {**profile()["run"], "dense_share": 0.7}
    assert dict(facts(profile(run=many)))["reads"].startswith(
        "in 70 % of layers and steps all neurons in order, else missed ones; loaders"
    )
    assert "trained-ahead guesses the next layer" in dict(facts(profile(prefetch="trained-ahead")))["predictor"]


def test_the_course_is_told_as_it_was() -> None:
    assert course_text([10.0, 20.0, 30.0, 40.0, 50.0]) == (
        "From 10.0 ms to 50.0 ms. The first quarter of the steps took 10.0 ms on average, the others 35.0 ms."
    )
    assert course_text([10.0]) == "From 10.0 ms to 10.0 ms." and course_text([]) == "No step was completed."


def test_energy_is_a_token_s_in_words_and_in_the_picture() -> None:
    energy = {
        "estimated": True, "joules": {"flash": 1.0, "DRAM": 3.0}, "total_joules": 4.0, "joules_per_token": 0.1, "constants": "some",
    }  # fmt: skip
    html = ENERGY(profile(energy=energy))
    assert "100 mJ a token, 4 J for the 40 decoded tokens. An estimate" in html
    assert "flash: 25 mJ a token, 25 %" in html and "DRAM: 75 mJ a token, 75 %" in html
    metered = ENERGY(profile(energy={**energy, "estimated": False, "constants": None}))
    assert "by the machine&#x27;s meters while decoding" in metered
