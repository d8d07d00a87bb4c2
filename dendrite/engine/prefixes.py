"""Finds how much of a new prompt is in the tree already, computed or not."""

from __future__ import annotations

from collections.abc import Sequence

from dendrite.engine.nodes import KVNode


def longest_match(candidates: list[KVNode], token_ids: Sequence[int], *, at_least: int) -> tuple[KVNode | None, int]:
    """The deepest live (node, offset) whose path is a prefix of `token_ids`; (None, 0) if there is none.

    `candidates` are the root nodes to begin with. A match counts from `at_least` tokens on, or when it is all of them.
    """
    best: tuple[int, KVNode | None, int] = (0, None, 0)
    begin = 0
    while candidates:
        length, node = max(
            ((common_prefix(child.token_ids, token_ids, begin), child) for child in candidates),
            key=lambda pair: pair[0],
        )
        if not length:
            break
        begin += length
        best = (begin, node, length)
        candidates = [child for child in node.children.values() if child.offset == length]
    matched, found, offset = best
    if matched < min(at_least, len(token_ids)):
        return None, 0
    return found, offset


def common_prefix(ours: Sequence[int], theirs: Sequence[int], begin: int = 0) -> int:
    """How many of `ours` equal `theirs[begin:]`."""
    num = min(len(ours), len(theirs) - begin)
    if num <= 0 or ours[0] != theirs[begin]:
        return 0
    for index in range(num):
        if ours[index] != theirs[begin + index]:
            return index
    return num
