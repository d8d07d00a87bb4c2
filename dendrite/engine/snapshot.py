"""One file that holds branches: safetensors, with a manifest in its metadata that vouches for every byte.

    metadata    dendrite_snapshot   the version, read before anything else
                manifest            JSON: the model, nodes (parent, offset), branches, the tensors' digest
                manifest_sha256     of that text
    tensors     tokens.0 kv.0 tokens.1 …        int64 [num_tokens]; [num_layers, 2, num_kv_heads, num_saved, head_dim]

A file is written beside its place and renamed into it, so a reader finds the old one or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dendrite.engine.errors import SnapshotDamaged, SnapshotError, SnapshotMismatch, SnapshotTooNew
from dendrite.engine.files import WorkFolder, remove_abandoned, sync

VERSION = 1
_KEY = "dendrite_snapshot"


@dataclass(frozen=True, slots=True)
class SavedNode:
    """A run of tokens. `parent` is an index into the nodes before it, `offset` how many of its tokens come first."""

    parent: int | None
    offset: int
    token_ids: list[int]
    kv: Tensor | None
    """[num_layers, 2, num_kv_heads, num_saved, head_dim] of the leading tokens; None if there is none."""


@dataclass(frozen=True, slots=True)
class SavedBranch:
    """A branch after `offset` tokens of a node. `parent` is an index into the branches before it."""

    parent: int | None
    node: int
    offset: int
    depth: int
    salt: int
    key: int
    num_forks: int
    logprobs: list[float]
    value: float | None
    chat: Any
    """(messages, number of tokens they render to) of a conversation, else None; as JSON has it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Branches of one model, parents before children."""

    model: str
    """The model's fingerprint."""
    nodes: list[SavedNode]
    branches: list[SavedBranch]

    @property
    def length(self) -> int:
        """Tokens of the longest path."""
        ends: list[int] = []
        starts: list[int] = []
        for node in self.nodes:
            starts.append(starts[node.parent] + node.offset if node.parent is not None else 0)
            ends.append(starts[-1] + len(node.token_ids))
        return max(ends)


def flattened(snapshot: Snapshot) -> Snapshot:
    """The same single branch with all of its path in one run."""
    (branch,) = snapshot.branches
    ends = [*(node.offset for node in snapshot.nodes[1:]), branch.offset]  # its nodes are a path, root first
    tokens = [token for node, end in zip(snapshot.nodes, ends, strict=True) for token in node.token_ids[:end]]
    parts: list[Tensor] = []
    for node, end in zip(snapshot.nodes, ends, strict=True):
        if node.kv is None:
            break
        parts.append(node.kv[:, :, :, :end])
        if node.kv.shape[3] < end:
            break
    kv = torch.cat(parts, dim=3) if parts else None
    return Snapshot(snapshot.model, [SavedNode(None, 0, tokens, kv)], [replace(branch, node=0, offset=len(tokens))])


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Writes the file, or leaves what is there as it is.

    Raises:
        SnapshotError: the folder is missing, the disk is full, or the like.
    """
    tensors: dict[str, Tensor] = {}
    for index, node in enumerate(snapshot.nodes):
        tensors[f"tokens.{index}"] = torch.tensor(node.token_ids, dtype=torch.int64)
        if node.kv is not None:
            tensors[f"kv.{index}"] = node.kv.contiguous()
    manifest = json.dumps(
        {
            "model": snapshot.model,
            "nodes": [{"parent": node.parent, "offset": node.offset} for node in snapshot.nodes],
            "branches": [asdict(branch) for branch in snapshot.branches],
            "sha256": _digest(tensors),
        }
    )
    metadata = {_KEY: str(VERSION), "manifest": manifest, "manifest_sha256": _sha256(manifest)}
    prefix = f".{path.name}.part-"
    part: WorkFolder | None = None
    try:
        remove_abandoned(path.parent, prefix)
        part = WorkFolder(path.parent, prefix)  # since safetensors makes temporary files beside what it writes
        whole = part.path / "whole"
        save_file(tensors, whole, metadata)
        sync(whole)
        whole.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"{path} cannot be written, what was there is unchanged: {error}") from error
    finally:
        if part is not None:
            part.remove()


def read_snapshot(path: Path, model: str) -> Snapshot:
    """Reads a file that was written for this model; every byte is checked.

    Raises:
        SnapshotDamaged: no snapshot, cut off, or altered.
        SnapshotTooNew: written by a later version.
        SnapshotMismatch: written for another model.
        SnapshotError: the file cannot be read at all.
    """
    with _opened(path) as file:
        manifest = _checked_manifest(path, file.metadata() or {}, model)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if _digest(tensors) != manifest["sha256"]:
        raise SnapshotDamaged(f"{path} was altered: its tensors are not those that were saved")
    try:
        return _assembled(manifest, tensors)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SnapshotDamaged(f"{path} was not written by this package, its parts do not fit: {error!r}") from error


def _assembled(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
    """The snapshot of a manifest that vouches for itself; raises whatever is the matter with one that was made up."""
    nodes: list[SavedNode] = []
    for index, node in enumerate(manifest["nodes"]):
        saved = SavedNode(
            node["parent"], node["offset"], tensors[f"tokens.{index}"].tolist(), tensors.get(f"kv.{index}")
        )
        above = len(nodes[_before(saved.parent, nodes)].token_ids) if saved.parent is not None else 0
        num_saved = saved.kv.shape[3] if saved.kv is not None else 0
        if not 0 <= saved.offset <= above or num_saved > len(saved.token_ids):
            raise ValueError(f"node {index} begins at {saved.offset} of {above}, with K/V of {num_saved} tokens")
        nodes.append(saved)
    branches: list[SavedBranch] = []
    for index, branch in enumerate(manifest["branches"]):
        end = SavedBranch(**branch)
        length = len(nodes[_before(end.node, nodes)].token_ids)
        if not 0 <= end.offset <= length:
            raise ValueError(f"branch {index} ends at {end.offset} of {length}")
        if end.parent is not None:
            _before(end.parent, branches)
        branches.append(end)
    if not branches:
        raise ValueError("there is no branch")
    return Snapshot(manifest["model"], nodes, branches)


def _before(index: int, known: Sized) -> int:
    """The index, if it is of one that came before."""
    if not 0 <= index < len(known):
        raise ValueError(f"{index} is none of the {len(known)} before it")
    return index


def read_tokens(path: Path, model: str) -> list[int]:
    """The tokens of a file's first run, without its K/V; they are not held against their digest.

    Raises:
        SnapshotError: as `read_snapshot`.
    """
    with _opened(path) as file:
        _checked_manifest(path, file.metadata() or {}, model)
        tokens: list[int] = file.get_tensor("tokens.0").tolist()
        return tokens


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file's parts, with an error of ours for each way that it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error}") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotDamaged(f"{path} is cut off or no snapshot: {error}") from error


def _checked_manifest(path: Path, metadata: Mapping[str, str], model: str) -> dict[str, Any]:
    version = metadata.get(_KEY)
    if version is None or not version.isdigit():
        raise SnapshotDamaged(f"{path} is a safetensors file, but no snapshot")
    if int(version) > VERSION:
        raise SnapshotTooNew(
            f"{path} has version {version} and this package reads up to {VERSION}: update it, or save again with it"
        )
    text = metadata.get("manifest", "")
    if metadata.get("manifest_sha256") != _sha256(text):
        raise SnapshotDamaged(f"{path} was altered: its manifest is not the one that was saved")
    manifest: dict[str, Any] = json.loads(text)
    theirs = str(manifest.get("model"))
    if theirs != model:
        raise SnapshotMismatch(
            f"{path} was saved with another model, dtype or `deterministic` (fingerprint {theirs[:12]}, "
            f"this one is {model[:12]}): load the engine with that one"
        )
    return manifest


def fingerprint(parts: Mapping[str, Tensor], description: str) -> str:
    """What tells a model from another: its description, and a sample of each tensor's shape, dtype and values."""
    found = hashlib.sha256(description.encode())
    for name, tensor in parts.items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)][:64].cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(sample.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
