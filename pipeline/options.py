"""How an engine is set up. `LLM`'s keyword arguments and the command line's flags map onto it one to one."""

from dataclasses import dataclass

from ..errors import InflashError

FFN_MODES = ("sparse", "hybrid", "naive", "resident")
POLICIES = ("lfu", "lru", "window", "none")
PREDICTOR_METHODS = ("trained", "weighted-svd", "sign-bits")
PATHS = ("auto", "sparse", "dense")
COMPUTE_DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What a user may choose about a run.

    Attributes:
      ffn: where feed-forward neurons are during decoding. "sparse": the predicted ones in a cache; "hybrid": all of them streamed
        for every token; "naive": every matrix of the model streamed for every token; "resident": all of them in memory.
      predictor: who names the neurons in "sparse". "auto": the store's best; "exact": the truth, from the up projection kept in
        memory; "none": all of them; otherwise a predictor's name in the store.
      cache_neurons: neurons of each layer kept in memory in "sparse"; a share of d_ff when it is a float up to 1.0, a count otherwise.
      window: tokens whose neurons stay, with policy "window" (the paper uses 4).
      policy: who stays in the cache. "lfu": the most frequently used, recent uses counting more; "lru": the most recently used;
        "window": those of the last `window` tokens; "none": nobody from one token to the next, for comparisons.
      prefetch: the look-ahead predictor by whose guess a layer's neurons are read while the layer before is computed. "auto": the store's
        best one, where `predictor` is one of the store's; "none": nothing is read early.
      path: how the neurons of a cached layer come when several sequences decode together. "sparse": the predicted ones by slot; "dense":
        all of them, read in order, each sequence still using its own; "auto": whichever costs less, as measured, with policy "lfu".
      overlap: whether neurons in the cache are computed while the others are being read. Off for comparisons only.
      max_num_seqs: sequences decoded together, B.
      max_model_len: longest sequence in tokens, prompt and output together; None: the model's own limit, 2048 at most.
      compute_dtype: dtype of the operands of products; sums are always float32. "auto": bfloat16 for 16-bit stores.
      loaders: loader processes.
      queue_depth: reads that each loader keeps under way.
      merge_gap: neurons at most so many bytes apart on flash are read together, with what lies between them.
      memory: bytes for everything that a run holds; a planner then decides what the options leave at their defaults. "auto": what is
        free, less a reserve. None: the options say it all.
      seed: base of the seeds of requests that bring none.
      verify: check every neuron that is read, and every weight that is loaded into memory, against its checksum.
    """

    ffn: str = "sparse"
    predictor: str = "auto"
    cache_neurons: float | int = 0.25
    window: int | None = None
    policy: str = "lfu"
    prefetch: str = "auto"
    path: str = "auto"
    overlap: bool = True
    max_num_seqs: int = 8
    max_model_len: int | None = None
    compute_dtype: str = "auto"
    loaders: int = 1
    queue_depth: int = 128
    merge_gap: int = 8 << 10
    memory: int | str | None = None
    seed: int = 0
    verify: bool = False

    def __post_init__(self) -> None:
        _one_of("ffn", self.ffn, FFN_MODES)
        _one_of("policy", self.policy, POLICIES)
        _one_of("path", self.path, PATHS)
        _one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if self.merge_gap < 0:
            raise InflashError(f"merge_gap should be a number of bytes, found {self.merge_gap!r}")
        for name in ("max_num_seqs", "loaders", "queue_depth"):
            _positive(name, getattr(self, name))
        if self.max_model_len is not None:
            _positive("max_model_len", self.max_model_len)
        if self.window is not None:
            _positive("window", self.window)
        if self.policy == "window" and self.window is None:
            raise InflashError("window should be a number of tokens with policy 'window' (the paper uses 4), found none")
        if self.policy != "window" and self.window is not None:
            raise InflashError(f"window={self.window} needs policy 'window', found {self.policy!r}")
        if isinstance(self.cache_neurons, bool) or not isinstance(self.cache_neurons, (int, float)):
            raise InflashError(f"cache_neurons should be a share or a count, found {self.cache_neurons!r}")
        if self.memory not in (None, "auto") and (
            not isinstance(self.memory, int) or isinstance(self.memory, bool) or self.memory < 1
        ):
            raise InflashError(f"memory should be a number of bytes, 'auto' or None, found {self.memory!r}")
        if self.cache_neurons <= 0 or (isinstance(self.cache_neurons, float) and self.cache_neurons > 1):
            raise InflashError(
                f"cache_neurons should be a share of d_ff above 0 and up to 1.0, or a count of neurons, found {self.cache_neurons!r}"
            )

    def cache_slots(self, d_ff: int) -> int:
        """Neurons of each layer that the cache holds, at least 1 and at most d_ff."""
        wanted = self.cache_neurons * d_ff if isinstance(self.cache_neurons, float) else self.cache_neurons
        return max(1, min(d_ff, round(wanted)))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InflashError(f"{name} should be one of {', '.join(choices)}, found {value!r}")


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InflashError(f"{name} should be a positive integer, found {value!r}")
