"""Triton's interpreter, for machines without a GPU; `tests/conftest.py` chooses it before anything imports Triton."""

from __future__ import annotations

import torch


def prepare_interpreter() -> None:
    """Let the interpreter of Triton 3.6, which holds scalars as arrays of one element, take them for loop bounds.

    NumPy 2.4 no longer makes an index of such an array.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_for_numpy(tensor: object, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch_for_numpy
