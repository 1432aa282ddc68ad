"""Torch's functions whose arguments are those of the op behind them: read by the op's schema.

Most functions of torch are made from the declarations of its ops, and take the same arguments by the same names. Which
overload a call means, and with which arguments, follows from the declared kinds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

aten = torch.ops.aten

#: Kinds of parameters, as the compiled reader knows them. With `OPTIONAL` added, None will do.
OTHER, TENSOR, TENSORS, INT, INTS, FLOAT, BOOL, NUMBER, STRING, OPTIONAL = 0, 1, 2, 3, 4, 5, 6, 7, 8, 16

_KINDS = {
    "Tensor": TENSOR, "List[Tensor]": TENSORS, "int": INT, "List[int]": INTS, "float": FLOAT, "bool": BOOL, "number": NUMBER,
    "str": STRING,
}  # fmt: skip

_CLASSES = {FLOAT: float, BOOL: bool, STRING: str}


class Required:
    """Stands for the default of a parameter that has none."""


class Parameter(NamedTuple):
    """A parameter of an op that may be given by its place.

    Attributes:
        name: its name.
        kind: what it takes.
        default: what it is if it is not given; `Required` if it has to be.
        length: for whole numbers of which a single one stands for several: how many; 1 otherwise.
    """

    name: str
    kind: int
    default: Any
    length: int


class Overload(NamedTuple):
    """An op and its parameters.

    Attributes:
        op: the op.
        parameters: those that may be given by their place.
        named: those that are given by name only, sorted by it.
    """

    op: Any
    parameters: tuple[Parameter, ...]
    named: tuple[Parameter, ...]


class BySchema(NamedTuple):
    """A reading (see :mod:`chainrule.function_arguments`) by the schemas of the function's overloads."""

    overloads: tuple[Overload, ...]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The overload that is meant and its positional arguments, without those at the end that are the defaults.

        Named arguments that are no defaults follow, as pairs that are sorted by the names.
        """
        for op, parameters, named in self.overloads:
            pairs = _named(named, kwargs) if named and kwargs else ()
            bound = None if pairs is None else _bound(parameters, args, kwargs, len(named) and _count(named, kwargs))
            if bound is not None:
                return (op, bound, pairs) if pairs else (op, bound)
        return None


def _count(named: tuple[Parameter, ...], kwargs: dict[str, Any]) -> int:
    return sum([parameter.name in kwargs for parameter in named])


def _named(named: tuple[Parameter, ...], kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """The arguments that are given by name only, but for defaults; None where one is of another kind."""
    pairs: list[tuple[str, Any]] = []
    for name, kind, default, length in named:
        if name not in kwargs:
            continue
        item = kwargs[name]
        read = _read(item, kind, length)
        if read is None and (item is not None or not kind & OPTIONAL):
            return None
        if read.__class__ is not default.__class__ or read != default:
            pairs.append((name, tuple(read) if read.__class__ is list else read))
    return tuple(pairs)


def _bound(
    parameters: tuple[Parameter, ...], args: tuple[Any, ...], kwargs: dict[str, Any], named: int
) -> tuple[Any, ...] | None:
    """The positional arguments; `named` are taken already. None where the call is not meant."""
    count, given = len(parameters), len(args)
    if given > count:
        # Whole numbers one by one, as methods take them.
        if count != 2 or parameters[1].kind != INTS:
            return None
        args = (args[0], args[1:])
        given = 2
    found: list[Any] = []
    kept = 0
    for place, (name, kind, default, length) in enumerate(parameters):
        if place < given:
            item = args[place]
        elif name in kwargs:
            item = kwargs[name]
            named += 1
        elif default is Required:
            return None
        else:
            found.append(default)
            continue
        read = _read(item, kind, length)
        if read is None and (item is not None or not kind & OPTIONAL):
            return None
        found.append(read)
        if read.__class__ is not default.__class__ or read != default:
            kept = place + 1
    return tuple(found[:kept]) if named == len(kwargs) else None


def _read(item: Any, kind: int, length: int) -> Any:
    """An argument as the op gets it; None if it is of another kind."""
    kind &= ~OPTIONAL
    found: Any = None
    if kind == TENSOR:
        found = item if isinstance(item, torch.Tensor) else None
    elif kind == INT or kind == NUMBER:
        found = item if item.__class__ is int or (kind == NUMBER and item.__class__ is float) else None
    elif kind in _CLASSES:
        found = item if item.__class__ is _CLASSES[kind] else None
    elif kind == INTS and item.__class__ is int:
        found = [item] * length
    elif (kind == INTS or kind == TENSORS) and item.__class__ in (list, tuple):
        same = all([isinstance(n, torch.Tensor) if kind == TENSORS else n.__class__ is int for n in item])
        found = [*item] if same and (item or kind == INTS) else None
    return found


#: Functions of torch, and methods of tensors of the same name, with the overloads of the op of that name.
_OVERLOADS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "addcdiv", "addcmul", "addmm", "addmv", "argmax", "argmin", "atan2", "baddbmm", "batch_norm", "bmm", "chunk", "clamp",
            "clamp_max", "clamp_min", "clone", "conv1d", "conv2d", "conv3d", "cosine_similarity", "cumprod", "cumsum", "detach",
            "diag_embed", "diagonal", "dot", "dropout", "embedding", "flip", "gather", "glu", "hardswish", "hypot",
            "index_add", "index_copy", "index_select", "isfinite", "isnan", "layer_norm", "linalg_vector_norm", "logaddexp",
            "logcumsumexp", "maximum", "minimum", "mish", "mm", "mv", "outer", "pad", "repeat", "scatter_add", "softshrink",
            "trace", "tril", "triu", "nan_to_num", "topk", "kron", "gelu", "block_diag", "diag",
            "linalg_cholesky", "linalg_cross", "linalg_det", "linalg_inv", "linalg_solve", "logdet", "linalg_multi_dot",
            "gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell",
            "binary_cross_entropy", "binary_cross_entropy_with_logits", "cosine_embedding_loss", "hinge_embedding_loss",
            "huber_loss", "l1_loss", "margin_ranking_loss",
            "clamp_", "clamp_max_", "clamp_min_", "copy_", "cos_", "exp_", "index_add_", "index_copy_", "log_", "neg_",
            "abs_", "addcdiv_", "addcmul_", "ceil_", "elu_", "erf_", "expm1_", "floor_", "hardtanh_", "leaky_relu_", "log1p_",
            "round_", "silu_", "square_",
            "reciprocal_", "relu_", "rsqrt_", "scatter_add_", "sigmoid_", "sin_", "sqrt_", "tanh_", "tril_", "triu_", "zero_",
            "avg_pool2d", "celu", "cholesky_solve", "cummax", "cummin", "hardshrink", "hardsigmoid", "heaviside",
            "linalg_matrix_power", "linalg_qr", "log_sigmoid", "logit", "masked_select", "nansum", "round", "selu", "sgn", "sign",
            "take", "threshold",
            "pairwise_distance", "poisson_nll_loss", "smooth_l1_loss", "triplet_margin_loss",
        ),
        ("default",),
    ),
    **dict.fromkeys(("gru", "lstm", "rnn_relu", "rnn_tanh"), ("input",)),
    "add": ("Tensor",),
    "all": ("default", "dim"),
    "any": ("default", "dim"),
    "bucketize": ("Tensor",),
    "copysign": ("Tensor", "Scalar"),
    "count_nonzero": ("default",),
    "searchsorted": ("Tensor",),
    "floor_divide": ("default", "Scalar"),
    "fmod": ("Scalar", "Tensor"),
    "lerp": ("Scalar", "Tensor"),
    "lerp_": ("Scalar", "Tensor"),
    "pow_": ("Scalar", "Tensor"),
    "remainder": ("Scalar", "Tensor"),
    "sub": ("Tensor",),
    "fill_": ("Scalar", "Tensor"),
    "masked_fill": ("Scalar", "Tensor"),
    "masked_fill_": ("Scalar", "Tensor"),
    "max": ("default", "dim"),
    "min": ("default", "dim"),
    "pow": ("Scalar",),
    "prod": ("default", "dim_int"),
    "scatter_": ("src", "value"),
    "select": ("int",),
    "sort": ("default",),
    "split": ("Tensor", "sizes"),
    "unbind": ("int",),
    "xlogy": ("Tensor",),
    "scaled_dot_product_attention": ("default",),
    "cross_entropy_loss": ("default",),
    "nll_loss_nd": ("default",),
    "unflatten": ("int",),
    "leaky_relu": ("default",),
    "logsumexp": ("default",),
    "elu": ("default",),
    "hardtanh": ("default",),
    "mse_loss": ("default",),
    # Torch has no second derivatives of these.
    "multi_margin_loss": ("default",),
    "multilabel_margin_loss": ("default",),
    "soft_margin_loss": ("default",),
}  # fmt: skip


def _overload(op: Any) -> Overload:
    parameters: list[Parameter] = []
    by_name: list[Parameter] = []
    for argument in op._schema.arguments:
        kind, name = 0, str(argument.type)
        if name.startswith("Optional["):
            kind, name = OPTIONAL, name.removeprefix("Optional[").removesuffix("]")
        # The functions do without a reduction where the ops take the mean.
        has_default = argument.has_default_value() and argument.name != "reduction"
        default = argument.default_value if has_default else Required
        of_kind = by_name if argument.kwarg_only else parameters
        of_kind.append(Parameter(argument.name, kind | _KINDS.get(name, OTHER), default, argument.N or 1))
    # What has to be given, and tensors, are for torch to bind.
    by_name = [item for item in by_name if item.default is not Required and item.kind & ~OPTIONAL not in (TENSOR, TENSORS)]
    return Overload(op, tuple(parameters), tuple(sorted(by_name)))


#: Ops whose results have names: only torch's own functions give those.
NAMED = frozenset({
    aten.max.dim, aten.min.dim, aten.sort.default, aten.topk.default, aten.cummax.default, aten.cummin.default,
    aten.linalg_qr.default,
})  # fmt: skip


#: Functions that are others under another name.
_OTHER_NAMES = {"clip": "clamp", "det": "linalg_det", "inverse": "linalg_inv", "__floordiv__": "floor_divide"}

_PLACES = (torch, torch.Tensor, torch._C._nn, torch._C._linalg)  # type: ignore[attr-defined]


def by_schema() -> dict[Any, Any]:
    """The readings, by the function as torch shows it to a function mode."""
    found: dict[Any, Any] = {}
    for name, overloads in _OVERLOADS.items():
        reading = BySchema(tuple(_overload(getattr(getattr(aten, name), overload)) for overload in overloads))
        for place in _PLACES:
            if (function := getattr(place, name, None)) is not None:
                found[function] = reading
    for name in ("maximum", "minimum"):  # torch.max and torch.min of two tensors
        for place in _PLACES:
            if (function := getattr(place, name[:3], None)) is not None:
                found[function] = BySchema((*found[function].overloads, _overload(getattr(aten, name).default)))
    for name, spelling in _OTHER_NAMES.items():
        for place in _PLACES:
            if (function := getattr(place, name, None)) is not None:
                found[function] = found[getattr(torch, spelling, None) or getattr(torch._C._linalg, spelling)]  # type: ignore[attr-defined]
    return found
