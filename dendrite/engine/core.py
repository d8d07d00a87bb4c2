"""What happens to branches, behind the handles: check, then change, under the loop's lock.

Every method here either does all it says or
raises and leaves everything as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dendrite.engine.archive import Archive, Entry
from dendrite.engine.arguments import checked_ids, checked_number, checked_seed, checked_text, is_whole, shortened
from dendrite.engine.blocks import BlockPool
from dendrite.engine.chat import check_messages
from dendrite.engine.config import EngineConfig, SamplingParams
from dendrite.engine.constraints import CONTINUE, Constraint
from dendrite.engine.errors import (
    BranchError,
    ConstraintError,
    ContextOverflow,
    EngineError,
    OutOfBlocks,
    RequestError,
    SnapshotDamaged,
)
from dendrite.engine.generation import GenerationRequest
from dendrite.engine.grammars import Grammars, Guide
from dendrite.engine.guarded_pool import GuardedPool
from dendrite.engine.head import Head
from dendrite.engine.ids import BlockId
from dendrite.engine.integrity import Guard
from dendrite.engine.loop import StepLoop
from dendrite.engine.messages import Message
from dendrite.engine.nodes import Tip
from dendrite.engine.prefix_folder import PrefixFolder
from dendrite.engine.prefixes import common_prefix
from dendrite.engine.random import child_key, root_key
from dendrite.engine.record import BranchRecord
from dendrite.engine.requests import Group, ScoreRequest
from dendrite.engine.runner import Runner
from dendrite.engine.scheduler import Scheduler
from dendrite.engine.snapshot import Snapshot, flattened, read_snapshot, write_snapshot
from dendrite.engine.states import explain, next_status
from dendrite.engine.stats import Stats, take_stats
from dendrite.engine.swap import SwapSpace
from dendrite.engine.text import Tokenizer
from dendrite.engine.tree import KVTree

if TYPE_CHECKING:
    from dendrite.engine.branch import Branch

Sink = Callable[[str | None], None]
"""Takes pieces of text from the loop's thread as they come, then None."""


class Core:
    """One engine's tree, loop and tokenizer, and what may be done with them."""

    def __init__(self, runner: Runner, head: Head, tokenizer: Tokenizer, config: EngineConfig) -> None:
        self.tokenizer = tokenizer
        self.spec = runner.spec
        self.grammars = Grammars(tokenizer, runner.spec.vocab_size)
        self.swap = SwapSpace(
            runner.mover,
            bytes_per_token=runner.spec.bytes_per_token,
            host_bytes=config.swap_memory if config.swap_memory is not None else runner.default_swap_bytes,
            disk_bytes=config.swap_disk,
            folder=config.swap_folder,
            has_sums=config.integrity == "checksum",
        )
        pool = self._pool(config, runner.num_blocks + 1, runner.block_size)
        self._tree = KVTree(pool, drop_stored=self.swap.drop)
        self._guard: Guard | None = None
        if isinstance(pool, GuardedPool):
            self._guard = Guard(self._tree, pool, self.swap, has_sums=config.integrity == "checksum")
        self._archive = Archive(self._tree, self.swap, runner.fingerprint)
        self._fingerprint = runner.fingerprint
        self._prefixes: PrefixFolder | None = None
        if config.prefix_cache is not None:
            self._prefixes = PrefixFolder(config.prefix_cache, runner.fingerprint, max_bytes=config.prefix_cache_size)
        scheduler = Scheduler(self._tree, self.swap, prefill_chunk=config.prefill_chunk or runner.prefill_chunk)
        self.loop = StepLoop(runner, head, self._tree, scheduler, self._guard)
        self._lock = self.loop.lock
        self._seed = config.seed
        self._root_numbers = itertools.count()

    def _pool(self, config: EngineConfig, num_blocks: int, block_size: int) -> BlockPool:
        if config.integrity == "off":
            return BlockPool(num_blocks, block_size)
        return GuardedPool(num_blocks, block_size, on_fault=self._on_fault)

    def _on_fault(self, block: BlockId, why: str) -> NoReturn:
        """A block is not its holder's: whatever the tree says now cannot be trusted any more."""
        assert self._guard is not None
        error = self._guard.fault(block, why)
        self.loop.condemn(error)
        raise error

    # --- the tree ----------------------------------------------------------------------------------------------

    def root(
        self,
        text: str | None,
        messages: Sequence[Message] | None,
        token_ids: Sequence[int] | None,
        seed: int | None,
    ) -> BranchRecord:
        """A new root on the longest live prefix of its prompt."""
        seed = checked_seed(seed)
        tokens = self._prompt_tokens(text, messages, token_ids)
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        self._check_length(len(tokens))
        chat = (tuple(messages), len(tokens)) if messages is not None else None
        found = self._read_prefix(tokens) if self._prefixes is not None else None
        with self._lock:
            self.loop.check_open()
            self.loop.release_collected()
            above = self._archive.rebuild(found) if found is not None else []
            tip, num_shared = self._tree.new_root(tokens, most_revived=self.loop.scheduler.num_spare)
            try:
                self._check_blocks(tip)
            except OutOfBlocks:
                self._tree.prune(tip)
                raise
            finally:
                for record in above:  # what the new root does not begin on goes
                    self._tree.prune(record.tip)
            self.loop.counters.num_shared += num_shared
            tip.depth = 0
            salt = child_key(root_key(self._seed), next(self._root_numbers)) if seed is None else root_key(seed)
            record = BranchRecord(tip, salt=salt, key=0, chat=chat)
            record.num_cached = min(num_shared, self._tree.num_known_kv(tip))
            return record

    def _read_prefix(self, tokens: Sequence[int]) -> Snapshot | None:
        """What the folder has of a prompt, if that is more than the tree has, and a block or more."""
        assert self._prefixes is not None
        path, length = self._prefixes.longest(tokens)
        with self._lock:
            known = self._tree.longest_known(tokens)
        if path is None or length <= known or length < self._tree.pool.block_size:
            return None
        return self._prefixes.read(path)

    def keep_prefix(self, record: BranchRecord) -> None:
        """Writes a computed branch to the folder of prefixes, unless all of it is there."""
        assert self._prefixes is not None
        tokens = self.token_ids(record)
        if self._prefixes.longest(tokens)[1] == len(tokens):
            return
        with self._lock:
            snapshot = self._archive.capture([(record, None, None)], kv=True)
        self._prefixes.write(flattened(snapshot), tokens)

    def fork(self, record: BranchRecord, num: int, at: int | None, seed: int | None) -> list[BranchRecord]:
        """`num` records at the same place, or at an earlier one; no block is touched."""
        if not is_whole(num) or num < 1:
            raise BranchError(f"fork({shortened(num)}): give a whole number, 1 or more")
        seed = checked_seed(seed)
        with self._lock:
            self.loop.check_open()
            tip = self._live_tip(record)
            if at is not None and not (is_whole(at) and 1 <= at <= tip.num_known):
                raise BranchError(
                    f"fork(at={shortened(at)}): the branch has {tip.num_known} tokens; give 1 to {tip.num_known}"
                )
            forks = [self._fork_one(record, index, at, seed) for index in range(num)]
            self.loop.counters.num_forks += num
            return forks

    def _fork_one(self, record: BranchRecord, index: int, at: int | None, seed: int | None) -> BranchRecord:
        tip = self._tree.fork(record.tip, at=at)
        tip.depth = (record.tip.depth or 0) + 1
        chat = record.chat if at is None or (record.chat is not None and at >= record.chat[1]) else None
        if seed is None:
            fork = BranchRecord(tip, salt=record.salt, key=child_key(record.key, record.num_forks), chat=chat)
        else:
            fork = BranchRecord(tip, salt=root_key(seed), key=child_key(0, index), chat=chat)
        record.num_forks += 1
        if at is None:
            fork.guide = record.guide
        return fork

    def append(self, record: BranchRecord, content: str | Sequence[int], *, special: bool) -> None:
        """Adds text or token ids."""
        tokens = self._content_tokens(content, "content", special=special)
        with self._lock:
            self._extend(record, tokens, keep=self._live_tip(record).length)

    def append_messages(self, record: BranchRecord, messages: Sequence[Message]) -> None:
        """Renders the conversation again with what was generated and `messages`; keeps the common tokens."""
        check_messages(messages)
        with self._lock:
            tip = self._idle_tip(record)
            if record.chat is None:
                raise BranchError("this branch is no conversation: root it with messages=, or append text")
            before, start = record.chat
            path = self._tree.token_ids(tip)
            turns = list(before)
            if len(path) > start:
                said = path[start:]
                turns.append({"role": "assistant", "content": self.tokenizer.decode(said), "token_ids": said})
            turns += messages
            tokens = self.tokenizer.render(turns)
            keep = max(1, common_prefix(path, tokens))
            self._extend(record, tokens[keep:], keep=keep)
            record.chat = (tuple(turns), len(tokens))

    def prune(self, record: BranchRecord) -> None:
        """Gives the record's blocks back, ending a generation that runs on it; idempotent."""
        with self._lock:
            tip = record.tip
            if tip.status in ("queued", "running"):
                self.loop.cancel_branch(tip)
            if tip.status != "pruned":
                tip.status = next_status(tip.status, "prune")
                self.loop.release(tip)

    def _extend(self, record: BranchRecord, tokens: list[int], *, keep: int) -> None:
        """Cuts the path to its first `keep` tokens and appends; the lock is held."""
        tip = self._idle_tip(record)
        self._check_length(keep + len(tokens))
        self.loop.release_collected()
        self._check_blocks(tip, keep + len(tokens) - tip.length)
        self._tree.truncate(tip, keep)
        record.guide = None
        if tokens:
            self._tree.extend(tip, tokens)

    # --- snapshots ---------------------------------------------------------------------------------------------

    def save(self, entries: Sequence[Entry], path: Path, *, kv: bool) -> None:
        """Writes branches to a file; the tree goes on meanwhile."""
        with self._lock:
            for record, _, _ in entries:
                self._idle_tip(record)
            snapshot = self._archive.capture(entries, kv=kv)
        write_snapshot(path, snapshot)

    def restore(self, path: Path) -> tuple[list[BranchRecord], Snapshot]:
        """The branches of a file, which are the engine's again."""
        snapshot = read_snapshot(path, self._fingerprint)
        self._check_length(snapshot.length)
        if any(not 0 <= token < self.spec.vocab_size for node in snapshot.nodes for token in node.token_ids):
            raise SnapshotDamaged(f"{path} was not written by this package: it has tokens that the model has not")
        with self._lock:
            self.loop.check_open()
            self.loop.release_collected()
            return self._archive.rebuild(snapshot), snapshot

    # --- reading -----------------------------------------------------------------------------------------------

    def text(self, record: BranchRecord) -> str:
        """The whole path; special tokens show, but for a BOS that the tokenizer put before raw text."""
        tokens = self.token_ids(record)
        is_raw = record.chat is None
        if is_raw and tokens[0] == self.tokenizer.bos_token_id:
            tokens = tokens[1:]
        return self.tokenizer.decode(tokens, special=True)

    def token_ids(self, record: BranchRecord) -> list[int]:
        """The whole path."""
        with self._lock:
            return self._tree.token_ids(self._live_tip(record))

    def num_tokens(self, record: BranchRecord) -> int:
        """Length of the path."""
        return self._live_tip(record).num_known

    def stats(self) -> Stats:
        """The picture of this moment."""
        with self._lock:
            self.loop.release_collected()
            return take_stats(self._tree, self.swap, self.loop.counters, self.spec.bytes_per_token)

    @property
    def blocks_used(self) -> int:
        """K/V blocks in use now."""
        with self._lock:
            self.loop.release_collected()
            return self._tree.pool.num_used

    def clear_cache(self) -> None:
        """Frees what nobody holds."""
        with self._lock:
            self.loop.release_collected()
            self._tree.clear_cache()

    def check_integrity(self) -> None:
        """Asserts every invariant of tree and pool."""
        with self._lock:
            self.loop.release_collected()
            self.loop.check_blocks()
            self._tree.check_integrity()

    def describe_blocks(self) -> str:
        """Used and all blocks, for `repr`."""
        return f"{self._tree.pool.num_used}/{self._tree.pool.num_total}"

    # --- requests ----------------------------------------------------------------------------------------------

    def submit_generations(
        self, branches: Sequence[Branch], params: SamplingParams, sink: Sink | None = None, *, priority: float = 0.0
    ) -> tuple[list[GenerationRequest], Group]:
        """One request a branch, as one group: all of them run, or none."""
        self._checked_ids([*params.logit_bias, *params.stop_token_ids], "logit_bias or stop_token_ids")
        priority = checked_number(priority, "priority")
        start = self.grammars.guide(params.constraint) if isinstance(params.constraint, Constraint) else None
        with self._lock:
            self.loop.check_open()
            for branch in branches:
                next_status(branch.record.tip.status, "submit")
            guides = [_guide(branch.record, params, start) for branch in branches]
            requests = [
                self._generation(branch, params, sink, guide) for branch, guide in zip(branches, guides, strict=True)
            ]
            return requests, self.loop.submit(requests, priority=priority)

    def _generation(
        self, branch: Branch, params: SamplingParams, sink: Sink | None, guide: Guide | None
    ) -> GenerationRequest:
        tip = branch.record.tip
        room = self.spec.context_length - tip.length
        if room < 1:
            raise ContextOverflow(
                f"the branch has {tip.length} tokens and the model's context holds {self.spec.context_length}: "
                "nothing can be generated; fork an earlier position with fork(at=...)"
            )
        return GenerationRequest(
            branch,
            params,
            tree=self._tree,
            tokenizer=self.tokenizer,
            num_tokens=min(params.max_tokens, room),
            sink=sink,
            guide=guide,
        )

    def submit_score(
        self, record: BranchRecord, choices: Sequence[str | Sequence[int]], *, priority: float = 0.0
    ) -> tuple[ScoreRequest, Group]:
        """One request for all choices."""
        _check_choices(choices)
        priority = checked_number(priority, "priority")
        candidates = [self._content_tokens(choice, f"choice {index}") for index, choice in enumerate(choices)]
        if not all(candidates):
            raise RequestError(f"choice {candidates.index([])} is empty: there is nothing to score")
        with self._lock:
            branch_tip = self._live_tip(record)
            self._check_length(branch_tip.num_known + max(map(len, candidates)))
            tip = self._tree.fork(branch_tip)
            try:
                request = ScoreRequest(tip, candidates)
                return request, self.loop.submit([request], priority=priority)
            except EngineError:
                self._tree.prune(tip)
                raise

    # --- checks ------------------------------------------------------------------------------------------------

    def _prompt_tokens(
        self, text: str | None, messages: Sequence[Message] | None, token_ids: Sequence[int] | None
    ) -> list[int]:
        if (text is not None) + (messages is not None) + (token_ids is not None) != 1:
            raise RequestError("give one of: text, messages=, token_ids=")
        if messages is not None:
            check_messages(messages)
            return self.tokenizer.render(messages)
        if text is not None:
            return self.tokenizer.encode(text, bos=True) if checked_text(text, "text") else []
        return self._checked_ids(token_ids, "token_ids")

    def _content_tokens(self, content: object, name: str, *, special: bool = False) -> list[int]:
        """Text or token ids that go on from other text."""
        if isinstance(content, str):
            return self.tokenizer.encode(checked_text(content, name), special=special)
        return self._checked_ids(content, name)

    def _live_tip(self, record: BranchRecord) -> Tip:
        if record.tip.status == "pruned":
            raise BranchError(explain("pruned"))
        return record.tip

    def _idle_tip(self, record: BranchRecord) -> Tip:
        self.loop.check_open()
        tip = self._live_tip(record)
        if tip.status != "idle":
            raise BranchError(explain(tip.status))
        return tip

    def _checked_ids(self, token_ids: object, name: str) -> list[int]:
        return checked_ids(token_ids, name, vocab_size=self.spec.vocab_size)

    def _check_length(self, length: int) -> None:
        if length > self.spec.context_length:
            raise ContextOverflow(
                f"{length} tokens are more than the {self.spec.context_length} that the model's context holds: "
                "shorten the prompt"
            )

    def _check_blocks(self, tip: Tip, num_more: int = 0) -> None:
        self.loop.scheduler.check_fits([(tip, max(0, num_more), False)])


def _check_choices(choices: object) -> None:
    if not isinstance(choices, Sequence) or isinstance(choices, str | bytes) or not choices:
        raise RequestError(f"score({shortened(choices)}): give a list of choices, at least one")


def _guide(record: BranchRecord, params: SamplingParams, start: Guide | None) -> Guide | None:
    """The branch's own guide: at the constraint's start, or where its last constrained text was cut off."""
    if params.constraint == CONTINUE:
        if record.guide is None:
            raise ConstraintError(
                'constraint="continue" needs a branch whose last generation was constrained and ended at max_tokens, '
                "or a fork of its end, with nothing appended since"
            )
        return record.guide.fork()
    return start.fork() if start is not None else None
