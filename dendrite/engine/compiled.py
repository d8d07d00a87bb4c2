"""Functions that run as one call, from beginning to end without Python's lock.

Every PyTorch operator that Python calls gives the interpreter's lock up and takes it back, which beside a busy Python
thread costs a wait each time; a step on the CPU has a thousand of them. TorchScript runs the same function with no
Python in between, and needs no compiler. It is the only part of PyTorch's wheels that does; PyTorch calls it deprecated
in favour of compilers, so nothing depends on it: without it the function itself runs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """What computes the same as `function`, whose own code it is; compiled once, at the first call of this.

    Modules of such functions cannot postpone the evaluation of annotations: TorchScript reads them.
    """
    return cast("Function", _compiled(function))


@functools.cache
def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    torchscript: Any = getattr(torch, "jit", None)
    if not hasattr(torchscript, "script"):
        return function
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            run = torchscript.script(function)
    except (OSError, RuntimeError) as error:  # the source is not there, or PyTorch reads it otherwise by now
        name = getattr(function, "__name__", "a function")
        warnings.warn(f"{name} runs operator by operator, slower beside busy threads: {error}", stacklevel=3)
        return function

    def call(*arguments: object) -> object:
        # Optimising costs the first calls half a second, and operators of this size gain nothing by it.
        with torchscript.optimized_execution(should_optimize=False):
            return run(*arguments)

    return call
