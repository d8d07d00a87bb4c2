"""Where these kernels run: on the GPU where there is one, else in Triton's interpreter, on the CPU.

`tests/conftest.py` chooses the interpreter, before anything imports Triton; the tests import kernels inside, so that
they are collected where there is no Triton.
"""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    pytest.importorskip("triton", reason="Triton is not made for this system")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
