"""Which functions of finite numbers may be infinite: there a product with a mask has to select."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

#: Functions that have no bound in the neighbourhood of some number, by the beginning of their names.
_POLES = (
    "div", "true_divide", "reciprocal", "rsqrt", "addcdiv", "log", "xlogy", "xlog1py", "special_xlog", "special_log", "tan.",
    "atanh", "arctanh", "erfinv", "ndtri", "special_erfinv", "special_ndtri", "digamma", "polygamma", "lgamma",
    "special_digamma", "special_psi", "special_zeta", "linalg_inv", "linalg_solve", "inverse",
)  # fmt: skip

#: Those of them that are bounded where their arguments are.
_BOUNDED = ("logical", "log_softmax", "log_sigmoid", "logsumexp", "logaddexp", "logcumsumexp")


def has_poles(function: Any, args: Sequence[Any]) -> bool:
    """Whether a function of finite numbers may be infinite: it divides, or takes a logarithm; or an infinity is an argument."""
    name = f"{getattr(function, '__name__', '')}.".lstrip("_")
    second = args[1] if len(args) > 1 and isinstance(args[1], (int, float)) else None
    if name.startswith(("pow.", "float_power.")):
        return second is None or second < 0
    if name.startswith(_POLES):
        return not (name.startswith(_BOUNDED) or (name.startswith("div") and second))
    return any(isinstance(item, float) and not math.isfinite(item) for item in args)


__all__ = ["has_poles"]
