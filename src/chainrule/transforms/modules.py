"""Modules as functions: functional_call, stack_module_state, functionalize and batch norm without running statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import stateless


def functional_call(
    module: nn.Module,
    parameter_and_buffer_dicts: dict[str, Tensor] | Sequence[dict[str, Tensor]],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Call a module with other parameters and buffers than its own.

    Args:
        module: the module.
        parameter_and_buffer_dicts: tensors by their names in the module, or a sequence of such dictionaries.
        args: positional arguments of the module; a single one need not be in a tuple.
        kwargs: keyword arguments of the module.
        tie_weights: whether parameters that are one in the module are one in the call.
        strict: whether every parameter and buffer must be given, and no other name.

    Returns:
        What the module returns.

    Raises:
        ValueError: if a name is given by two dictionaries.
        TypeError: if the dictionaries are no dictionaries.
        RuntimeError: with ``strict``, if names are missing or unexpected.

    Example:
        >>> import torch, chainrule
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> chainrule.functional_call(net, {"weight": torch.ones(1, 2)}, torch.tensor([1.0, 2.0]))
        tensor([3.])
    """
    if isinstance(parameter_and_buffer_dicts, dict):
        tensors = parameter_and_buffer_dicts
    elif isinstance(parameter_and_buffer_dicts, Sequence):
        tensors = {}
        for number, given in enumerate(parameter_and_buffer_dicts):
            if not isinstance(given, dict):
                raise TypeError(
                    "functional_call: expected all elements of the sequence to be dictionaries, "
                    f"element {number} is {type(given)}"
                )
            repeated = tensors.keys() & given.keys()
            if repeated:
                raise ValueError(f"functional_call: {sorted(repeated)} appear in several of the given dictionaries")
            tensors.update(given)
    else:
        raise TypeError(
            "functional_call: expected a dictionary or a sequence of dictionaries of tensors, got "
            f"{type(parameter_and_buffer_dicts)}"
        )
    refused = isinstance(module, (nn.DataParallel, torch.jit.ScriptModule)) or torch.jit.is_tracing()
    if refused or torch.compiler.is_compiling():
        return stateless._functional_call(module, tensors, args, kwargs, tie_weights=tie_weights, strict=strict)
    positional = () if args is None else args if isinstance(args, tuple) else (args,)
    places = _places(module, tensors, strict)
    if places is None:
        # In turn: a module that stands at two places would keep what it was given otherwise.
        with stateless._reparametrize_module(module, tensors, tie_weights=tie_weights, strict=strict, stack_weights=True):
            return module(*positional, **(kwargs or {}))
    before = [entries[key] for entries, key in places]
    for (entries, key), tensor in zip(places, tensors.values(), strict=True):
        entries[key] = tensor
    try:
        return module(*positional, **(kwargs or {}))
    finally:
        for name, (entries, key), own in zip([*tensors], places, before, strict=True):
            if key in entries:  # the module may have assigned another one, or removed it
                tensors[name] = entries[key]
            entries[key] = own


def _places(module: nn.Module, tensors: dict[str, Tensor], strict: bool) -> list[tuple[dict[str, Any], str]] | None:
    """Where in a module tensors of some names stand: a dictionary and a key for each.

    None for all that is not plain, which torch has to look at: other names, tensors or modules that are there twice, classes
    with ways of their own to name what they hold.
    """
    found: dict[str, tuple[dict[str, Any], str]] = {}
    held: set[int] = set()
    count = 0
    waiting: list[tuple[str, Any]] = [("", module)]
    for prefix, one in waiting:
        if not isinstance(one, nn.Module) or not _is_plainly_named(one.__class__):
            return None
        held.add(id(one))
        count += 1
        for entries in (one._parameters, one._buffers):
            if entries.__class__ is not dict:
                return None
            for key, tensor in entries.items():
                if tensor is not None:
                    held.add(id(tensor))
                    count += 1
                    found[prefix + key] = entries, key
        for key, child in one._modules.items():
            if child is not None:
                waiting.append((f"{prefix}{key}.", child))
        if len(held) != count:  # something stands at two places
            return None
    if strict and found.keys() != tensors.keys():
        return None
    places = []
    for name, tensor in tensors.items():
        if (place := found.get(name)) is None or not isinstance(tensor, Tensor):
            return None
        places.append(place)
    return places


def _is_plainly_named(kind: Any) -> bool:
    """Whether a class of modules names what it holds as torch does."""
    return (
        kind.named_modules is nn.Module.named_modules and kind._named_members is nn.Module._named_members
        and kind.named_parameters is nn.Module.named_parameters and kind.named_buffers is nn.Module.named_buffers
    )  # fmt: skip


def stack_module_state(models: Sequence[nn.Module] | nn.ModuleList) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stack the parameters and buffers of several models of one architecture, for an ensemble under ``vmap``.

    Args:
        models: at least one model; all of one class, all in training or all in evaluation mode.

    Returns:
        ``(parameters, buffers)``: dictionaries of tensors with a leading dimension of ``len(models)``. Stacked
        parameters are new leaves that require grad where the models' do.

    Raises:
        RuntimeError: if there is no model, or modes or classes differ.

    Example:
        >>> import torch, chainrule
        >>> parameters, _ = chainrule.stack_module_state([torch.nn.Linear(2, 1) for _ in range(3)])
        >>> parameters["weight"].shape
        torch.Size([3, 1, 2])
    """
    if len(models) == 0:
        raise RuntimeError("stack_module_state: expected at least one model, got 0.")
    if not (all(m.training for m in models) or all(not m.training for m in models)):
        raise RuntimeError("stack_module_state: expected all models to have the same training/eval mode.")
    kind = type(models[0])
    if not all(type(m) is kind for m in models):
        raise RuntimeError("stack_module_state: expected all models to be of the same class.")
    parameters = [dict(model.named_parameters()) for model in models]
    buffers = [dict(model.named_buffers()) for model in models]
    stacked = {name: _stacked(tuple(each[name] for each in parameters)) for name in parameters[0]}
    return stacked, {name: _stacked(tuple(each[name] for each in buffers)) for name in buffers[0]}


def _stacked(tensors: tuple[Tensor, ...]) -> Tensor:
    if not all(t.requires_grad == tensors[0].requires_grad for t in tensors):
        raise RuntimeError("stack_module_state: expected parameters of one name to require grad in all models or in none")
    if not tensors[0].requires_grad:
        return torch.stack(tensors)
    if all(t.is_leaf for t in tensors):
        return torch.stack(tensors).detach().requires_grad_()
    return torch.stack(tensors)


def functionalize(func: Callable[..., Any], *, remove: str = "mutations") -> Callable[..., Any]:
    """Return a function with the effects of ``func`` that never writes to its inputs' memory while it runs.

    ``func`` runs on copies of its input tensors; where it has written to one, the new value is copied back into the
    caller's tensor at the end, as torch.func.functionalize does. (chainrule's transforms need none of this: they record
    every write as a new value.)

    Args:
        func: the function.
        remove: ``"mutations"``, or ``"mutations_and_views"`` (results are then no views of inputs).

    Returns:
        A function of the same arguments and results.

    Raises:
        RuntimeError: if ``remove`` is unknown.

    Example:
        >>> import torch, chainrule
        >>> chainrule.functionalize(lambda x: x.clone().add_(1))(torch.zeros(2))
        tensor([1., 1.])
    """
    if remove not in ("mutations", "mutations_and_views"):
        raise RuntimeError(
            f"functionalize(f, remove='mutations'): received invalid argument for remove={remove}. Valid options are: "
            "remove='mutations', remove='mutations_and_views'"
        )

    @wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        versions = [copy._version if isinstance(copy, Tensor) and not copy.is_inference() else None for copy in copies]
        called, named = torch.utils._pytree.tree_unflatten(copies, spec)
        output = func(*called, **named)
        for leaf, copy, version in zip(leaves, copies, versions, strict=True):
            if isinstance(leaf, Tensor) and (version is None or copy._version != version):
                if leaf.shape != copy.shape:
                    leaf.resize_(copy.shape)
                leaf.copy_(copy)
        originals = {id(copy): leaf for copy, leaf in zip(copies, leaves, strict=True) if isinstance(copy, Tensor)}

        def own(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            return originals.get(id(item), item)

        return torch.utils._pytree.tree_map(own, output)

    return wrapper


def replace_all_batch_norm_modules_(root: nn.Module) -> nn.Module:
    """Turn off the running statistics of every batch norm in ``root``, in place.

    Args:
        root: the module.

    Returns:
        ``root``.

    Example:
        >>> import torch, chainrule
        >>> chainrule.replace_all_batch_norm_modules_(torch.nn.BatchNorm1d(3)).track_running_stats
        False
    """
    for module in root.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = None
            module.running_var = None
            module.num_batches_tracked = None
            module.track_running_stats = False
    return root
