"""A model's folder as files: which are there, which are whole, what they hash to. No torch, no Transformers.

Transformers fills a missing tensor with random numbers and reports a truncated file without its name, so the files are
checked before it sees them.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from dendrite.engine.errors import ModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Any one of these is a tokenizer that Transformers can build from."""
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors format allows its header."""


def check_folder(folder: Path, *, advice: str = "") -> None:
    """Refuse a folder that lacks a file or holds a damaged one.

    Args:
        folder: the model's folder.
        advice: what the user can do about it, added to every message.

    Raises:
        ModelError: names the file and what is wrong with it.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(_told(f"{folder} has no {CONFIG}, so it is not a model's folder", advice))
    _read_json(folder / CONFIG, advice)
    for path in weight_files(folder, advice=advice):
        _check_safetensors(path, advice)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(_told(f"{folder} has no tokenizer: none of {', '.join(TOKENIZERS)}", advice))


def is_complete(folder: Path) -> bool:
    """Whether `check_folder` would pass."""
    try:
        check_folder(folder)
    except ModelError:
        return False
    return True


def weight_files(folder: Path, *, advice: str = "") -> list[Path]:
    """The safetensors files that make up the weights, in name order.

    Raises:
        ModelError: a file of the index is missing, or there are no safetensors weights at all.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        return _sharded(folder, advice)
    if any(folder.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{folder} holds pickled weights only, which can run code when they are read: "
            "save the model again with `save_pretrained`, which writes safetensors"
        )
    raise ModelError(_told(f"{folder} has no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}", advice))


def folder_bytes(folder: Path) -> int:
    """Bytes the folder's files take, links followed."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def file_sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: Path) -> str:
    """One SHA-256 over the names and contents of all weight files, in hexadecimal."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _sharded(folder: Path, advice: str) -> list[Path]:
    index = _read_json(folder / WEIGHTS_INDEX, advice)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(_told(f"{folder / WEIGHTS_INDEX} names no weights", advice))
    shards = [folder / str(name) for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.is_file():
            raise ModelError(_told(f"{shard} is missing; {WEIGHTS_INDEX} lists it", advice))
    return shards


def _read_json(path: Path, advice: str) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(_told(f"{path} cannot be read ({error})", advice)) from error
    if not isinstance(content, dict):
        raise ModelError(_told(f"{path} does not hold a JSON object", advice))
    return content


def _check_safetensors(path: Path, advice: str) -> None:
    """Compare the file's size with what its header says it holds; reads only the header."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(header_bytes, MAX_HEADER_BYTES)))
        data_bytes = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelError(_told(f"{path} is corrupt: its safetensors header cannot be read", advice)) from error
    expected = 8 + header_bytes + data_bytes
    if size != expected:
        raise ModelError(_told(f"{path} is corrupt: {size:,} bytes where its header names {expected:,}", advice))


def _told(problem: str, advice: str) -> str:
    return f"{problem}; {advice}" if advice else problem
