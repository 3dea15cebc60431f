"""inflash runs language models that do not fit in memory: attention in DRAM, feed-forward neurons on flash.

The names below are imported when they are first used, so that a loader process or `inflash --help` never pulls in jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InflashError
    from .pipeline.llm import LLM
    from .pipeline.outputs import CompletionOutput, RequestOutput
    from .pipeline.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "InflashError", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": ".pipeline.llm",
    "SamplingParams": ".pipeline.sampling_params",
    "RequestOutput": ".pipeline.outputs",
    "CompletionOutput": ".pipeline.outputs",
    "InflashError": ".errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
