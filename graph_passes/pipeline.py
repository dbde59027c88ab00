"""What a pass is, and how a target's list of passes is run and printed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Concatenate, ParamSpec

import onnx_ir as ir

Params = ParamSpec("Params")
Pass = Callable[[ir.Model], ir.Model]


def graph_pass(
    edit: Callable[Concatenate[ir.Model, Params], None],
) -> Callable[Concatenate[ir.Model, Params], ir.Model]:
    """Make a pure pass out of a function that edits the model it is given.

    The clone copies nodes and shares tensors, so it costs the same for 1 MB or 8 GB of weights.
    """

    @functools.wraps(edit)
    def run(model: ir.Model, /, *args: Params.args, **kwargs: Params.kwargs) -> ir.Model:
        result = model.clone()
        edit(result, *args, **kwargs)
        return result

    return run


def run_passes(
    model: ir.Model, passes: Iterable[Pass], on_pass: Callable[[str], None] | None = None
) -> ir.Model:
    """Run passes in order; the given model stays as it is.

    Args:
        on_pass: told the description of every pass before it runs.
    """
    for apply in passes:
        if on_pass is not None:
            on_pass(describe_pass(apply))
        model = apply(model)
    return model


def is_pass(apply: Pass, function: Callable[..., ir.Model]) -> bool:
    """Whether a pass is this function, with or without settings."""
    return getattr(apply, "func", apply) is function


def describe_pass(apply: Pass) -> str:
    """A pass as one would write it, such as ``quantize_matmul(bits=4, block_size=32)``."""
    if not isinstance(apply, functools.partial):
        return apply.__name__
    settings = [repr(value) for value in apply.args]
    settings += [f"{name}={value!r}" for name, value in apply.keywords.items()]
    return f"{apply.func.__name__}({', '.join(settings)})"
