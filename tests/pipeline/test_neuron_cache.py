"""The policies against models in plain Python, which keep lists and know nothing of slots, logs, stamps or counts."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inflash.errors import InflashError
from inflash.pipeline.neuron_cache import LeastFrequentlyUsed, LeastRecentlyUsed, NeuronCache, SlidingWindow, make_cache


class CacheModel:
    """What is kept, oldest first: neurons by the call that last touched them, within a call by their number."""

    def __init__(self, num_slots: int, window: int | None) -> None:
        self.num_slots, self.window = num_slots, window
        self.kept: list[int] = []
        self.token_of: dict[int, int] = {}
        self.token = 0

    def begin_token(self) -> None:
        self.token += 1
        if self.window is not None:
            self.kept = [neuron for neuron in self.kept if self.token_of[neuron] >= self.token - self.window]

    def place(self, neuron_ids: list[int]) -> tuple[list[int], list[int]]:
        """Hits and misses."""
        hits = [neuron for neuron in neuron_ids if neuron in self.kept]
        misses = [neuron for neuron in neuron_ids if neuron not in self.kept]
        others = [neuron for neuron in self.kept if neuron not in neuron_ids]
        too_many = max(0, len(others) + len(neuron_ids) - self.num_slots)
        self.kept = others[too_many:] + neuron_ids
        self.token_of |= dict.fromkeys(neuron_ids, self.token)
        return hits, misses


class NeuronCacheMachine(RuleBasedStateMachine):
    """Any sequence of tokens, each with one or several calls."""

    cache: NeuronCache

    @initialize(
        num_neurons=st.integers(1, 40), share=st.floats(0, 1), window=st.one_of(st.none(), st.integers(1, 5)), data=st.data()
    )
    def make(self, num_neurons: int, share: float, window: int | None, data: st.DataObject) -> None:
        self.num_neurons = num_neurons
        self.num_slots = max(1, round(share * num_neurons))
        self.cache = make_cache(num_neurons, self.num_slots, "lru" if window is None else "window", window)
        self.model = CacheModel(self.num_slots, window)
        self.slot_of: dict[int, int] = {}
        self.begun = False

    @rule()
    def begin_token(self) -> None:
        self.cache.begin_token()
        self.model.begin_token()
        self.begun = True

    @precondition(lambda self: self.begun)
    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        neurons = st.integers(0, self.num_neurons - 1)
        neuron_ids = sorted(data.draw(st.sets(neurons, max_size=self.num_slots)))
        placement = self.cache.place(np.asarray(neuron_ids, np.int32))
        hits, misses = self.model.place(neuron_ids)
        assert placement.hit_ids.tolist() == hits
        assert placement.miss_ids.tolist() == misses
        assert placement.hit_slots.tolist() == [self.slot_of[neuron] for neuron in hits]
        assert all(array.dtype == np.int32 for array in (placement.hit_ids, placement.hit_slots, placement.miss_slots))
        self.slot_of = {neuron: slot for neuron, slot in self.slot_of.items() if neuron in self.model.kept}
        self.slot_of |= dict(zip(misses, placement.miss_slots.tolist(), strict=True))

    @precondition(lambda self: self.begun)
    @rule()
    def place_too_many(self) -> None:
        if self.num_slots < self.num_neurons:
            with pytest.raises(
                InflashError, match=rf"{self.num_neurons} neurons asked for at once, found {self.num_slots} slots"
            ):
                self.cache.place(np.arange(self.num_neurons, dtype=np.int32))

    @invariant()
    def keeps_what_the_model_keeps(self) -> None:
        if self.begun:
            assert self.cache.resident().tolist() == sorted(self.model.kept)

    @invariant()
    def no_slot_is_used_twice(self) -> None:
        if self.begun:
            used = [self.slot_of[neuron] for neuron in self.model.kept]
            assert len(set(used)) == len(used)
            assert all(0 <= slot < self.num_slots for slot in used)

    @invariant()
    def the_log_does_not_grow(self) -> None:
        if self.begun:
            assert isinstance(self.cache, LeastRecentlyUsed)
            assert self.cache._log.shape == (4 * self.num_slots + 64, 2)
            assert 0 <= self.cache._head <= self.cache._tail <= len(self.cache._log)


TestNeuronCache = NeuronCacheMachine.TestCase
TestNeuronCache.settings = settings(max_examples=150, stateful_step_count=40)


class FrequencyMachine(RuleBasedStateMachine):
    """What holds for every choice of who leaves: nobody who is needed now, nobody without need, and no slot for two."""

    @initialize(num_neurons=st.integers(1, 40), share=st.floats(0, 1))
    def make(self, num_neurons: int, share: float) -> None:
        self.num_neurons, self.num_slots = num_neurons, max(1, round(share * num_neurons))
        self.cache = LeastFrequentlyUsed(num_neurons, self.num_slots)
        self.slot_of: dict[int, int] = {}

    @rule(tokens=st.integers(1, 3))
    def begin_token(self, tokens: int) -> None:
        for _ in range(tokens):
            self.cache.begin_token()

    @rule(share=st.floats(0, 1))
    def resize(self, share: float) -> None:
        self.num_slots = max(1, round(share * self.num_neurons))
        self.cache.resize(self.num_slots)
        self.slot_of = {neuron: slot for neuron, slot in self.slot_of.items() if slot < self.num_slots}

    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        neuron_ids = sorted(data.draw(st.sets(st.integers(0, self.num_neurons - 1), max_size=self.num_slots)))
        placement = self.cache.place(np.asarray(neuron_ids, np.int32))
        hits, misses = placement.hit_ids.tolist(), placement.miss_ids.tolist()
        assert hits == [neuron for neuron in neuron_ids if neuron in self.slot_of]
        assert misses == [neuron for neuron in neuron_ids if neuron not in self.slot_of]
        assert placement.hit_slots.tolist() == [self.slot_of[neuron] for neuron in hits]
        given = placement.miss_slots.tolist()
        assert len(set(given)) == len(given) and all(0 <= slot < self.num_slots for slot in given)
        evicted = {neuron for neuron, slot in self.slot_of.items() if slot in given}
        assert not evicted & set(neuron_ids)
        assert len(evicted) == max(0, len(self.slot_of) + len(misses) - self.num_slots)
        self.slot_of = {neuron: slot for neuron, slot in self.slot_of.items() if neuron not in evicted}
        self.slot_of |= dict(zip(misses, given, strict=True))

    @rule(data=st.data(), block=st.integers(1, 40))
    def fill(self, data: st.DataObject, block: int) -> None:
        """All neurons pass by in blocks, and free slots keep those that have most votes."""
        votes = np.asarray(data.draw(st.lists(st.integers(0, 3), min_size=self.num_neurons, max_size=self.num_neurons)))
        wanted = self.cache.wanted(votes)
        absent = sorted(set(range(self.num_neurons)) - set(self.slot_of), key=lambda neuron: (-votes[neuron], neuron))
        assert wanted.tolist() == sorted(absent[: self.num_slots - len(self.slot_of)])
        for start in range(0, len(wanted), block):
            some = wanted[start : start + block]
            given = self.cache.fill(some, votes[some]).tolist()
            assert len(set(given)) == len(given) and not set(given) & set(self.slot_of.values())
            assert all(0 <= slot < self.num_slots for slot in given)
            self.slot_of |= dict(zip(some.tolist(), given, strict=True))
        assert self.cache.full or len(self.slot_of) == self.num_neurons

    @invariant()
    def keeps_what_it_was_given(self) -> None:
        if hasattr(self, "cache"):
            assert self.cache.resident().tolist() == sorted(self.slot_of)


TestFrequency = FrequencyMachine.TestCase
TestFrequency.settings = settings(max_examples=150, stateful_step_count=40)


def test_what_is_used_often_survives_a_burst_of_what_is_used_once() -> None:
    """Forty neurons for twenty tokens, then more new ones than there are slots, then the forty again."""
    misses = {}
    for policy in ("lfu", "lru"):
        cache, often = make_cache(1000, 100, policy, None), np.arange(40, dtype=np.int32)
        for token in range(30):
            cache.begin_token()
            fresh = np.arange(200 + 12 * token, 212 + 12 * token, dtype=np.int32)
            cache.place(often if token < 20 else fresh)
        cache.begin_token()
        misses[policy] = len(cache.place(often).miss_ids)
    assert misses["lfu"] <= 4
    assert misses["lru"] == 40


def test_what_nobody_voted_for_leaves_first() -> None:
    """A full cache, half of it with two votes each; as many other neurons as the other half come one by one."""
    cache, votes = LeastFrequentlyUsed(200, 100), np.repeat([2, 0, 0], [50, 50, 100])
    cache.fill(cache.wanted(votes), votes[:100])
    for neuron in range(100, 150):
        cache.begin_token()
        cache.place(np.asarray([neuron], np.int32))
    assert np.isin(np.arange(50), cache.resident()).sum() > 40  # the hand sees a few slots at a time


def test_what_a_token_was_given_stays_while_there_are_others() -> None:
    """A guess's neurons, used once, are the least used of all, and may still be on their way."""
    cache = make_cache(1000, 40, "lfu", None)
    for _ in range(5):
        cache.begin_token()
        cache.place(np.arange(40, dtype=np.int32))
    cache.begin_token()
    guess, needed = (np.arange(start, start + 18, dtype=np.int32) for start in (100, 200))
    guessed = cache.place(guess).miss_slots
    assert not np.isin(cache.place(needed).miss_slots, guessed).any()
    assert np.isin(guess, cache.resident()).all()
    everything = np.arange(300, 340, dtype=np.int32)  # there are no others
    assert sorted(cache.place(everything).miss_slots.tolist()) == list(range(40))


def test_old_uses_count_less() -> None:
    """What was used at every token for long gives way in the end; weights are scaled back long before they overflow."""
    cache = LeastFrequentlyUsed(1000, 10)
    for _ in range(300):
        cache.begin_token()
        cache.place(np.arange(5, dtype=np.int32))
    for token in range(400):
        cache.begin_token()
        cache.place(np.arange(100 + token % 8, 100 + token % 8 + 3, dtype=np.int32))
    assert not np.isin(np.arange(5), cache.resident()).any()
    for _ in range(60_000):
        cache.begin_token()
    assert 0 < cache._weight < 1e201 and np.isfinite(cache._count).all()
    cache.place(np.arange(10, dtype=np.int32))
    assert cache.resident().tolist() == list(range(10))


@pytest.mark.parametrize("window", [None, 1, 4])
def test_long_runs_agree_with_the_model(window: int | None) -> None:
    """Longer than the log, with neurons that come back as they do in a model: many times its length in touches."""
    rng = np.random.default_rng()
    num_neurons, num_slots = 300, 90
    cache = make_cache(num_neurons, num_slots, "lru" if window is None else "window", window)
    model = CacheModel(num_slots, window)
    often = rng.permutation(num_neurons)
    for _ in range(600):
        cache.begin_token()
        model.begin_token()
        ids = np.unique(often[rng.geometric(0.02, rng.integers(0, 60)) % num_neurons]).astype(np.int32)
        placement = cache.place(ids)
        hits, misses = model.place(ids.tolist())
        assert placement.hit_ids.tolist() == hits
        assert placement.miss_ids.tolist() == misses
    assert cache.resident().tolist() == sorted(model.kept)


def test_the_window_is_counted_in_tokens() -> None:
    """The paper's example: what was active in the last k tokens is there, what was before is not."""
    cache = SlidingWindow(10, 10, window=2)
    seen = []
    for token in range(5):
        cache.begin_token()
        seen.append(cache.resident().tolist())
        cache.place(np.asarray([token, 9], np.int32))
    assert seen == [[], [0, 9], [0, 1, 9], [1, 2, 9], [2, 3, 9]]


def test_policies_by_name() -> None:
    assert type(make_cache(4, 2, "lfu", None)) is LeastFrequentlyUsed
    assert type(make_cache(4, 2, "lru", None)) is LeastRecentlyUsed
    assert type(make_cache(4, 2, "window", 3)) is SlidingWindow


@pytest.mark.parametrize(("policy", "window"), [("lfu", None), ("lru", None), ("window", 4)])
def test_a_token_costs_what_changes_not_what_is_kept(policy: str, window: int | None) -> None:
    """Eight million bytes of stamps are not compared for sixteen neurons: that would make a megabyte of truth values."""
    num_slots = 1 << 20
    cache = make_cache(2 * num_slots, num_slots, policy, window)
    cache.begin_token()
    cache.place(np.arange(num_slots, dtype=np.int32))
    rng = np.random.default_rng()

    def bytes_made(action) -> int:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        action()
        return tracemalloc.get_traced_memory()[1] - before

    def token() -> None:
        cache.begin_token()
        cache.place(np.unique(rng.integers(0, 2 * num_slots, 16)).astype(np.int32))

    for _ in range((window or 0) + 1):  # what leaves the window at first is everything
        token()
    stamps = np.zeros(num_slots, np.int64)
    tracemalloc.start()
    try:
        assert bytes_made(lambda: np.flatnonzero(stamps == 1)) >= num_slots
        assert max(bytes_made(token) for _ in range(30)) < num_slots // 16
    finally:
        tracemalloc.stop()
