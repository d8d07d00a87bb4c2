"""Kernels in CUDA C++, compiled when they are first needed by the runtime compiler that comes with PyTorch.

Triton decides itself when a program's loads start; a kernel that lives from having enough of them on their way, from
before the kernel in front has ended, is written in CUDA C++, in a `.cu` file beside the module that launches it. There
is no compiler to install: NVRTC is a library of PyTorch's CUDA builds, and `cuda-bindings`, in the extra `cuda`, calls
it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Argument = Tensor | int | None
MAX_SHARED_BYTES = 227 << 10
"""Dynamic shared memory that a block may ask for (Hopper)."""


class CompileError(RuntimeError):
    """NVRTC or the driver refused a kernel; the message is theirs."""


@dataclass(frozen=True)
class CudaKernel:
    """A kernel loaded on a device."""

    function: Any  # a handle of cuda-bindings, which is untyped
    device: torch.device

    def launch(self, grid: tuple[int, int], num_threads: int, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Launch on the current stream; the kernel itself waits for the one in front (`griddepcontrol.wait`).

        Args:
            grid: blocks along x and y.
            num_threads: of a block.
            shared_bytes: dynamic shared memory of a block.
            arguments: tensors and None as pointers, numbers as 32-bit integers.
        """
        from cuda.bindings import driver  # noqa: PLC0415 - only machines with a GPU have it

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream(self.device).cuda_stream
        overlap = driver.CUlaunchAttribute()
        overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [overlap], 1
        values = tuple(_value(argument) for argument in arguments)
        kinds = tuple(ctypes.c_int32 if isinstance(argument, int) else ctypes.c_void_p for argument in arguments)
        _checked(driver.cuLaunchKernelEx(config, self.function, (values, kinds), 0))


def can_compile(device: torch.device) -> bool:
    """Whether kernels can be compiled: the device is a Hopper, which they are for, and cuda-bindings is there."""
    if device.type != "cuda" or find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def compiled(source: str, name: str, constants: Mapping[str, int | str], device: torch.device) -> CudaKernel:
    """The kernel `name` of a `.cu` file in this folder, compiled once for each set of constants.

    Raises:
        CompileError: it could not be compiled or loaded.
    """
    return _compiled(source, name, tuple(constants.items()), device)


@cache
def _compiled(source: str, name: str, constants: tuple[tuple[str, int | str], ...], device: torch.device) -> CudaKernel:
    from cuda.bindings import driver  # noqa: PLC0415 - only machines with a GPU have it

    major, minor = torch.cuda.get_device_capability(device)
    image = cubin(source, constants, f"sm_{major}{minor}a")
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context, if nothing has yet
        module = _checked(driver.cuModuleLoadData(image))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, MAX_SHARED_BYTES))
        return CudaKernel(function, device)


def cubin(source: str, constants: Sequence[tuple[str, int | str]], architecture: str) -> bytes:
    """Compile a `.cu` file of this folder; needs NVRTC, but no device.

    Args:
        source: the file's name.
        constants: macros and their values.
        architecture: such as `sm_90a`.

    Raises:
        CompileError: with the compiler's messages.
    """
    from cuda.bindings import nvrtc  # noqa: PLC0415 - only machines with a GPU have it

    text = (Path(__file__).parent / source).read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", b"-default-device"]
    options += [f"-D{name}={value}".encode() for name, value in constants]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise CompileError(f"{source} does not compile: {log.decode(errors='replace').strip()}")
    image: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, image))
    return image


def _value(argument: Argument) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument


def _checked(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401 - what cuda-bindings gives is untyped
    """What a call of cuda-bindings gave, less the status in front."""
    status, *values = answer
    if int(status):
        raise CompileError(f"CUDA: {status.name}")
    return values[0] if values else None
