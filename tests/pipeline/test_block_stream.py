"""Blocks of a real layer through few buffers, with real loaders."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline_bench import Bench, bench
from tiny_models import write_neurons

from inflash.errors import RunError
from inflash.pipeline.block_stream import BlockStream
from inflash.pipeline.loader_pool import Ticket
from inflash.pipeline.weights import alias

BLOCK = 50  # neurons; a layer of 500 has ten blocks
NUM_ITEMS = 10
DONE = jnp.zeros(1)


@pytest.fixture(scope="module")
def neurons(tmp_path_factory: pytest.TempPathFactory):
    return write_neurons(tmp_path_factory.mktemp("neurons") / "store", d_model=128, d_ff=500, num_layers=1)


@pytest.fixture
def loaded(neurons) -> Iterator[Bench]:
    with bench(neurons[0]) as b:
        yield b


class Recorded:
    """A stream over the layer's blocks that remembers what was asked for."""

    def __init__(self, b: Bench, *, num_buffers: int, cyclic: bool) -> None:
        self.asked: list[tuple[int, int]] = []
        self.bench = b
        self.stream = BlockStream(b.pool, self._load, items=range(NUM_ITEMS), num_buffers=num_buffers, cyclic=cyclic)

    def _load(self, item: int, buffer: int) -> list[Ticket]:
        self.asked.append((item, buffer))
        half = BLOCK // 2  # two requests an item
        return [
            self.bench.pool.read_range(0, item * BLOCK + first, half, buffer * BLOCK + first, self.bench.parts)
            for first in (0, half)
        ]

    def rows(self, buffer: int) -> np.ndarray:
        return self.bench.rows(0)[buffer * BLOCK :][:BLOCK]


def expected(neurons, item: int) -> np.ndarray:
    return neurons[1][0][item * BLOCK :][:BLOCK, 0].view(np.uint32)


@pytest.mark.parametrize("num_buffers", [2, 3, 7])
@pytest.mark.parametrize("cyclic", [False, True])
def test_items_come_in_order_and_whole(neurons, loaded: Bench, num_buffers: int, cyclic: bool) -> None:
    stream = Recorded(loaded, num_buffers=num_buffers, cyclic=cyclic)
    for _ in range(3):
        for item in range(NUM_ITEMS):
            buffer = stream.stream.take(item)
            np.testing.assert_array_equal(stream.rows(buffer), expected(neurons, item))
            stream.stream.give_back(buffer, DONE)
    items = [item for item, _ in stream.asked]
    assert items[: 3 * NUM_ITEMS] == [*range(NUM_ITEMS)] * 3
    # A cycle runs on into the next token; a stream that ends reads nothing more.
    assert len(items) - 3 * NUM_ITEMS == (num_buffers if cyclic else 0)


def test_it_reads_ahead_but_not_over_the_buffer_in_use(loaded: Bench) -> None:
    stream = Recorded(loaded, num_buffers=4, cyclic=False)
    buffer = stream.stream.take(0)
    assert [item for item, _ in stream.asked] == [0, 1, 2, 3]
    assert len({buffer for _, buffer in stream.asked}) == 4
    digest = slow_digest(alias(stream.rows(buffer)))
    stream.stream.give_back(buffer, digest)
    assert digest.is_ready() or stream.asked[4:] == []  # the newest result may still be under way
    digest.block_until_ready()
    second = stream.stream.take(1)
    stream.stream.give_back(second, DONE)
    assert stream.asked[4:] == [(4, buffer), (5, second)]


def test_another_order_is_followed_from_its_beginning(neurons, loaded: Bench) -> None:
    """As when some layers are streamed for steps and all of them for prompts."""
    stream = Recorded(loaded, num_buffers=3, cyclic=False)
    orders = {"prompt": range(NUM_ITEMS), "step": [2, 5, 6]}
    for name in ("prompt", "step", "step", "prompt"):
        stream.stream.follow(orders[name], cyclic=name == "step")
        for item in orders[name]:
            buffer = stream.stream.take(item)
            np.testing.assert_array_equal(stream.rows(buffer), expected(neurons, item))
            stream.stream.give_back(buffer, DONE)
    steps = [item for item, _ in stream.asked][NUM_ITEMS:]
    assert steps[:6] == [2, 5, 6] * 2


def test_another_item_than_the_next_starts_over(neurons, loaded: Bench) -> None:
    """As when a prompt follows a token: the rest of the cycle is dropped."""
    stream = Recorded(loaded, num_buffers=3, cyclic=True)
    for item in (0, 1, 7, 8, 0, 9, 0):
        buffer = stream.stream.take(item)
        np.testing.assert_array_equal(stream.rows(buffer), expected(neurons, item))
        stream.stream.give_back(buffer, DONE)


@jax.jit
def slow_digest(rows: jax.Array) -> jax.Array:
    """Reads the rows many times over; changes to them meanwhile change the result."""
    return jax.lax.fori_loop(0, ROUNDS, lambda _, digest: digest * np.uint32(1664525) + rows, jnp.zeros_like(rows))


ROUNDS = 3000


def test_a_buffer_is_filled_again_only_when_its_reader_is_done(neurons, loaded: Bench) -> None:
    stream = Recorded(loaded, num_buffers=2, cyclic=True)
    views = [alias(stream.rows(buffer)) for buffer in range(2)]
    digests = []
    for item in [*range(NUM_ITEMS)] * 2:
        buffer = stream.stream.take(item)
        digests.append(slow_digest(views[buffer]))
        stream.stream.give_back(buffer, digests[-1])
    factor = np.uint32(sum(pow(1664525, n, 1 << 32) for n in range(ROUNDS)) % (1 << 32))
    for number, digest in enumerate(digests):
        np.testing.assert_array_equal(np.asarray(digest), expected(neurons, number % NUM_ITEMS) * factor)


def test_items_beyond_the_end_are_refused(loaded: Bench) -> None:
    stream = Recorded(loaded, num_buffers=2, cyclic=False)
    with pytest.raises(RunError, match="item 10 is out of range"):
        stream.stream.take(NUM_ITEMS)


def test_buffers_that_nobody_gave_back_are_missed(loaded: Bench) -> None:
    stream = Recorded(loaded, num_buffers=2, cyclic=False)
    stream.stream.take(0)
    stream.stream.take(1)
    with pytest.raises(RunError, match="no buffer was given back"):
        stream.stream.take(2)
