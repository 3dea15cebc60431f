"""What a run has cost: the paper's three parts of a token (flash I/O, memory management, compute), and what was read for it."""

from dataclasses import asdict, dataclass


@dataclass(slots=True, kw_only=True)
class StepTimes:
    """Totals since the run began. Reference: arXiv:2312.11514, 2.3.

    Attributes:
      total_ns: wall time inside the engine.
      io_wait_ns: of that, waiting for loaders with nothing to compute.
      memory_ns: of that, looking neurons up, giving them slots and asking loaders.
      decode_ns, prompt_ns: wall time of decoding steps, and of prompts.
      steps: decoding steps.
      tokens: tokens that decoding steps made, over all sequences.
      prompt_tokens: tokens of prompts.
      cached_tokens: tokens of prompts that were not processed, as another prompt begins with them.
      hits, misses: neurons found in the cache and not, over layers and steps; what a guess has already asked for is a hit.
      prefetched: neurons that were read because of a guess, over layers and steps.
      neurons: neurons that there are, over the same layers and steps.
      sparse_layers, dense_layers: cached layers whose neurons came by slot and in order, over steps.
      decode_bytes, prompt_bytes: bytes of weights that were asked of the loaders.
    """

    total_ns: int = 0
    io_wait_ns: int = 0
    memory_ns: int = 0
    decode_ns: int = 0
    prompt_ns: int = 0
    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    neurons: int = 0
    sparse_layers: int = 0
    dense_layers: int = 0
    decode_bytes: int = 0
    prompt_bytes: int = 0

    def count(self, *, hits: int, misses: int) -> None:
        self.hits += hits
        self.misses += misses

    def summary(self) -> dict[str, float | int]:
        """The figures that people ask for; times in ms a decoding step."""
        steps = max(self.steps, 1)
        compute_ns = self.decode_ns - self.io_wait_ns - self.memory_ns
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "tokens": self.tokens,
            "steps": self.steps,
            "prompt_s": self.prompt_ns / 1e9,
            "decode_s": self.decode_ns / 1e9,
            "tokens_per_s": self.tokens / (self.decode_ns / 1e9) if self.decode_ns else 0.0,
            "mib_per_token": self.decode_bytes / 2**20 / max(self.tokens, 1),
            "cache_hit_rate": self.hits / max(self.hits + self.misses, 1),
            "prefetched_share": self.prefetched / max(self.neurons, 1),
            "predicted_share": (self.hits + self.misses) / max(self.neurons, 1),
            "dense_share": self.dense_layers / max(self.dense_layers + self.sparse_layers, 1),
            "io_wait_ms": self.io_wait_ns / 1e6 / steps,
            "memory_ms": self.memory_ns / 1e6 / steps,
            "compute_ms": max(compute_ns, 0) / 1e6 / steps,
            "total_ms": self.decode_ns / 1e6 / steps,
        }

    def copy(self) -> "StepTimes":
        return StepTimes(**asdict(self))
