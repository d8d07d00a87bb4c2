"""Compiles the attention kernels for a Hopper GPU, on any machine: what the interpreter accepts may not compile.

Run as a script, since one process has either the interpreter or the compiler. Prints the name of each kernel and the
shared memory it takes, in bytes.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dendrite.engine.attention.forms import APART, FULL_PRECISION, SHORT, WIDE, KernelConfig
from dendrite.engine.attention.tree_kernel import attend_items, merge_partials
from dendrite.engine.attention.triton_tree import MERGE, MERGE_OF_FEW

HOPPER = GPUTarget("cuda", 90, 32)


def compile_attend(config: KernelConfig, dtype: str, *, head_dim: int, group: int, entry_keys: int) -> None:
    tiles = f"tensordesc<{dtype}[{config.block_n}, {head_dim}]>"
    constants: dict[str, object] = {
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "ENTRY_KEYS": entry_keys,
        "STAGES": config.num_stages,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "USE_TILES": config.use_tiles,
        "PDL": True,
    }
    signature = {
        "query": f"*{dtype}",
        "output": f"*{dtype}",
        "pool": f"*{dtype}",
        "pool_tiles": tiles,
        "partials": "*fp32",
        "partial_lse": "*fp32",
        "work": "*i32",
        "scale": "fp32",
        "num_slots": "i32",
        "query_stride": "i32",
    }
    if not config.use_tiles:
        constants["pool_tiles"] = None
    _compile(attend_items, signature, constants, config.num_warps)


def compile_merge(config: KernelConfig, dtype: str, merge: tuple[int, int], *, head_dim: int, group: int) -> None:
    width, num_warps = merge
    constants: dict[str, object] = {
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "WIDTH": width,
        "PDL": True,
    }
    signature = {"output": f"*{dtype}", "partials": "*fp32", "partial_lse": "*fp32", "work": "*i32"}
    _compile(merge_partials, signature, constants, num_warps)


def _compile(kernel: Any, signature: dict[str, str], constants: dict[str, object], num_warps: int) -> None:  # noqa: ANN401 - Triton's
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in {"num_slots", "query_stride"}
    }
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=HOPPER, options={"num_warps": num_warps})
    assert made.metadata.shared <= 227 << 10
    print(kernel.__name__, made.metadata.shared)


if __name__ == "__main__":
    for form in (WIDE, SHORT, APART):
        compile_attend(form, "bf16", head_dim=128, group=4, entry_keys=8)
    compile_attend(FULL_PRECISION, "fp32", head_dim=64, group=3, entry_keys=8)
    for merge in (MERGE, MERGE_OF_FEW):
        compile_merge(WIDE, "bf16", merge, head_dim=128, group=4)
