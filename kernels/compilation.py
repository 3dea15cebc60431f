"""How kernels are compiled: one place for the options that decide whether XLA's CPU code runs at memory speed.

The kernels read each weight once, with sums that XLA turns into plain loops. Three options make those loops fast:

- A float sum has a fixed order unless the compiler may reorder it, and a loop in a fixed order cannot use vector registers.
  `xla_cpu_enable_fast_math` allows reordering (and fused multiply-add); NaN, infinity and division keep their meaning, as XLA's
  `xla_cpu_fast_math_honor_*` options are on by default.
- XLA prefers 256-bit vectors even where the processor has 512.
- `optimization_barrier` is removed before instructions are fused (by a pass with this odd name), so that what was meant to be
  computed once, a rounded vector or a list of slots, moves into the loop over the rows. Barriers that stay keep it out.

Without them every kernel gives the same results, several times slower. They take effect on the outermost `jit` only.
"""

from collections.abc import Callable
from typing import Any

import jax

COMPILER_OPTIONS: dict[str, bool | int | str] = {
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_prefer_vector_width": 512,
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
_LESS_UNROLLED: dict[str, bool | int | str] = {"xla_backend_optimization_level": 2}


def jit(function: Callable[..., Any], *, unrolled: bool = True, **arguments: Any) -> Any:
    """`jax.jit` with this project's compiler options; `arguments` are jit's own (static_argnames, donate_argnames, ...).

    Args:
      unrolled: as far as LLVM goes. The sums over rows of neurons need it; attention, predictors and the head are as fast without, and
        compiled in three quarters of the time.
    """
    return jax.jit(function, compiler_options=COMPILER_OPTIONS | ({} if unrolled else _LESS_UNROLLED), **arguments)
