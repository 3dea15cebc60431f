"""How a memory budget is spent: what stays in memory, what is streamed, and through how much room.

Every way to run a model is a point of one space, which a `Plan` describes. A user's flags name a point directly (`plan_from_options`); with
a memory budget `planner` looks for the fastest one that fits.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ..storage.model_config import ModelConfig
from ..storage.store import Store
from .options import EngineOptions
from .predictors import choose_predictor, choose_prefetch

CACHED, STREAMED, RESIDENT = "cached", "streamed", "resident"
"""A layer's neurons while decoding: the predicted ones through a cache; all of them streamed; all of them in memory."""

BLOCK_BYTES = 8 << 20  # at 2 GB/s the disk takes 4 ms for it: a thousand times the cost of asking
PROMPT_TOKENS = (
    1024  # of prompts that pass at a time: computing takes ten times what reading all layers does, see docs/architecture.md
)

QKV, ATTENTION_OUT = "qkv", "attention_out"
"""Attention's matrices: the projections of queries, keys and values in one, and that of the output."""

BLOCK_BUFFERS = 4  # of the blocks' size
FEW_BLOCK_BUFFERS = 2  # of prompts alone, which compute with a block for longer than it is read

_HEAD = frozenset({"tokens", "head"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to run a model.

    Attributes:
      ffn: for each layer one of CACHED, STREAMED and RESIDENT.
      slots: neurons of each layer that memory has room for; 0 where they are streamed.
      streamed_qkv, streamed_out: for each layer whether this matrix of its attention is streamed for every token.
      streamed_head: whether the output head is, and with it the token embeddings.
      predictor: who names neurons; None where no layer is CACHED.
      prefetch: the look-ahead predictor; None: nothing is read before its layer.
      loaders, queue_depth, merge_gap: see `EngineOptions`.
      block_bytes, block_buffers: of a block of neurons that is streamed, and how many there are at a time.
      prompt_tokens: tokens of prompts that pass through the layers at a time, at most.
      num_seqs, max_length: sequences decoded together, and the longest; 0 where `Engine.prepare` decides.
      kv_positions: of the KV cache, which sequences of any length share; 0 where `Engine.prepare` decides.
    """

    ffn: tuple[str, ...]
    slots: tuple[int, ...]
    streamed_qkv: tuple[bool, ...]
    streamed_out: tuple[bool, ...]
    streamed_head: bool
    predictor: str | None
    prefetch: str | None
    loaders: int
    queue_depth: int
    merge_gap: int
    block_bytes: int = BLOCK_BYTES
    block_buffers: int = BLOCK_BUFFERS
    prompt_tokens: int = PROMPT_TOKENS
    num_seqs: int = 0
    max_length: int = 0
    kv_positions: int = 0

    def streamed_names(self, layer: int | None) -> frozenset[str]:
        """Tensors of a layer (None: the embeddings) that are streamed rather than loaded."""
        if layer is None:
            return _HEAD if self.streamed_head else frozenset()
        return frozenset(name for name, ways in self.streamed_matrices.items() if ways[layer])

    @property
    def streamed_matrices(self) -> dict[str, tuple[bool, ...]]:
        """For each of attention's matrices, the layers that stream it."""
        return {QKV: self.streamed_qkv, ATTENTION_OUT: self.streamed_out}

    @property
    def resident_attention(self) -> float:
        """The share of attention's bytes that memory holds."""
        return 1 - (3 * sum(self.streamed_qkv) + sum(self.streamed_out)) / (4 * len(self.ffn))

    def layers(self, way: str) -> list[int]:
        """The layers whose neurons go one way."""
        return [layer for layer, found in enumerate(self.ffn) if found == way]

    @property
    def streams_matrices(self) -> bool:
        return self.streamed_head or any(self.streamed_qkv) or any(self.streamed_out)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Plan":
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
        return cls(**fields)


def head_block_rows(config: ModelConfig) -> int:
    """Rows of the head that are streamed at a time: as many as an output projection has room for."""
    return max(1, min(config.vocab_size, config.d_model**2 // config.embed_dim))


def guessed_layers(plan: Plan) -> list[int]:
    """The layers whose neurons the look-ahead predictor guesses: all that are cached and have one before them."""
    return [layer for layer in plan.layers(CACHED) if layer]


def plan_from_options(store: Store, options: EngineOptions) -> Plan:
    """The plan that a user's flags name.

    Raises:
      InflashError: the store has no such predictor.
    """
    num_layers, d_ff = store.config.num_layers, store.config.d_ff
    way = {"sparse": CACHED, "resident": RESIDENT}.get(options.ffn, STREAMED)
    slots = {CACHED: options.cache_slots(d_ff), RESIDENT: d_ff, STREAMED: 0}[way]
    predictor = choose_predictor(store, options.predictor) if way == CACHED else None
    return Plan(
        ffn=(way,) * num_layers,
        slots=(slots,) * num_layers,
        streamed_qkv=(options.ffn == "naive",) * num_layers,
        streamed_out=(options.ffn == "naive",) * num_layers,
        streamed_head=options.ffn == "naive",
        predictor=predictor,
        prefetch=choose_prefetch(store, options.prefetch, predictor),
        loaders=options.loaders,
        queue_depth=options.queue_depth,
        merge_gap=options.merge_gap,
        block_bytes=BLOCK_BYTES,
        prompt_tokens=min(PROMPT_TOKENS, options.max_num_seqs * (options.max_model_len or store.config.max_positions)),
    )
