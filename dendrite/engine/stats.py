"""What the engine counts, and the picture of itself that `Engine.stats` gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dendrite.engine.requests import ScoreRequest
from dendrite.engine.step import Step
from dendrite.engine.swap import SwapSpace
from dendrite.engine.tree import KVTree


@dataclass(slots=True)
class Counters:
    """Running totals since the engine was loaded; the engine's lock guards them."""

    num_steps: int = 0
    num_computed: int = 0
    num_sampled: int = 0
    num_forced: int = 0
    num_logical: int = 0
    num_shared: int = 0
    num_forks: int = 0
    peak_blocks: int = 0
    busy_seconds: float = 0.0

    def count_step(self, step: Step, *, blocks: int) -> None:
        """Adds one step, with `blocks` in use; before its results reach anyone who could ask."""
        self.num_steps += 1
        self.num_computed += step.num_rows
        self.peak_blocks = max(self.peak_blocks, blocks)

    def count_score(self, score: ScoreRequest) -> None:
        """Adds what the score's candidates would have cost as requests of their own."""
        self.num_logical += sum(score.tip.length + len(candidate) - 1 for candidate in score.candidates)


@dataclass(frozen=True, slots=True)
class Stats:
    """One moment of an engine. Tokens and blocks are counts; totals run since the engine was loaded."""

    blocks_total: int
    blocks_used: int
    """Blocks that live branches hold; 0 when everything is pruned."""
    blocks_cached: int
    """Blocks of prefixes that no branch holds any more. They are as good as free: whoever needs one gets it at once."""
    blocks_free: int
    """Blocks with nothing in them: free + cached + used = total."""
    blocks_peak: int
    """The most blocks in use after any step."""
    block_bytes: int
    """Bytes of K/V in one block, over all layers."""
    branches: int
    """Live branches."""
    nodes: int
    """Runs of tokens they are stored in."""
    logical_tokens: int
    """Sum of the lengths of all live paths: what they would take without sharing."""
    physical_tokens: int
    """Tokens that have K/V slots, each counted once."""
    depth_histogram: dict[int, int]
    """Fork depth of the live branches -> how many."""
    ref_counts: dict[int, int]
    """References to a node (branches and nodes attached to it) -> how many nodes."""
    copy_on_writes: int
    """Blocks copied because two branches went on from the middle of one."""
    forks: int
    steps: int
    tokens_computed: int
    """Rows that went through the model."""
    tokens_logical: int
    """Rows that as many separate requests, each with its whole prompt, would have put through it."""
    tokens_sampled: int
    tokens_forced: int
    """Generated tokens that a constraint forced, so that none was drawn."""
    tokens_shared: int
    """Prompt tokens of roots that were live or cached already and so were not computed again."""
    cache_hits: int
    """Roots that began on a cached prefix."""
    cache_hit_tokens: int
    """Tokens of those prefixes."""
    cache_evictions: int
    """Cached runs of tokens that were given up because somebody needed their blocks."""
    swap_memory_used: int
    """Bytes of host memory that hold K/V outside the pool."""
    swap_disk_used: int
    """Bytes of files that do."""
    tokens_swapped_out: int
    tokens_swapped_in: int
    tokens_swap_lost: int
    """Tokens that there was no room for outside the pool either; they are computed again when they are needed."""
    busy_seconds: float
    """Time spent in steps."""

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens per second of busy time; 0 before the first step."""
        return self.tokens_sampled / self.busy_seconds if self.busy_seconds else 0.0


def take_stats(tree: KVTree, swap: SwapSpace, counters: Counters, bytes_per_token: int) -> Stats:
    """The picture of this moment; the engine's lock is held."""
    pool = tree.pool
    nodes = [node for node in tree.nodes.values() if node not in tree.cache]
    held = [(tip.depth, tip.length) for tip in tree.tips if tip.depth is not None]
    return Stats(
        blocks_total=pool.num_total,
        blocks_used=pool.num_used,
        blocks_cached=pool.num_cached,
        blocks_free=pool.num_free,
        blocks_peak=counters.peak_blocks,
        block_bytes=bytes_per_token * pool.block_size,
        branches=len(held),
        nodes=len(nodes),
        logical_tokens=sum(length for _, length in held),
        physical_tokens=sum(node.num_placed for node in nodes),
        depth_histogram=dict(sorted(Counter(depth for depth, _ in held).items())),
        ref_counts=dict(sorted(Counter(node.ref_count for node in nodes).items())),
        copy_on_writes=tree.num_copies,
        forks=counters.num_forks,
        steps=counters.num_steps,
        tokens_computed=counters.num_computed,
        tokens_logical=counters.num_logical,
        tokens_sampled=counters.num_sampled,
        tokens_forced=counters.num_forced,
        tokens_shared=counters.num_shared,
        cache_hits=tree.cache.num_hits,
        cache_hit_tokens=tree.cache.num_hit_tokens,
        cache_evictions=tree.cache.num_evicted,
        swap_memory_used=swap.host_used,
        swap_disk_used=swap.disk_used,
        tokens_swapped_out=swap.num_tokens_out,
        tokens_swapped_in=swap.num_tokens_in,
        tokens_swap_lost=swap.num_tokens_lost,
        busy_seconds=counters.busy_seconds,
    )
