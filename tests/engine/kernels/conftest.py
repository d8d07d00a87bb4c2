"""Where these kernels run: on the GPU where there is one, else in Triton's interpreter, on the CPU.

The interpreter has to be chosen before the kernels are imported, so tests import them inside.
"""

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_CUDA else "cpu")
