"""One branch's generation: what came out, and the state it has while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dendrite.engine.config import SamplingParams
from dendrite.engine.errors import ConstraintError
from dendrite.engine.grammars import Guide
from dendrite.engine.requests import GenerateRequest
from dendrite.engine.sampling_row import Sampled, SampleRow
from dendrite.engine.text import Tokenizer
from dendrite.engine.text_stream import CONTEXT_TOKENS, TextStream
from dendrite.engine.tree import KVTree

if TYPE_CHECKING:
    from dendrite.engine.branch import Branch

FinishReason = Literal["stop", "length", "eos", "cancelled", "constraint"]
TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """What one branch generated in one call. `branch.text` ends with `text`."""

    text: str
    """Without the stop string or end-of-text token that ended it."""
    token_ids: tuple[int, ...]
    """The tokens the branch gained. After a stop inside a token, its remaining characters are encoded afresh."""
    logprobs: tuple[float, ...]
    """Log-probability (nats) of each sampled token that was kept, under the model's own distribution. Tokens encoded
    afresh at a stop have none, nor have those that a constraint forced (`fast_forward=False` draws these too), so this
    may be shorter than `token_ids`."""
    top_logprobs: tuple[TopLogprobs, ...]
    """For each sampled token that was kept, the `top_logprobs` likeliest (token id, log-probability); else empty."""
    finish_reason: FinishReason
    """`stop`: a stop string or stop token, or the constraint allows nothing more; `eos`: the model ended the text;
    `length`: `max_tokens` or the context's end; `cancelled`: the branch was pruned, or its stream closed, meanwhile;
    `constraint`: the constraint cannot be met from here, and `error` says why."""
    branch: Branch = field(repr=False)
    num_forced: int = 0
    """How many of the tokens the constraint forced: they went through the model together with the next drawn one."""
    error: ConstraintError | None = None


class GenerationRequest(GenerateRequest):
    """A generation on its way: owns the branch's tip until it ends, and rolls it back if it fails.

    It holds the branch while it runs and no longer: the loop's thread may have the request a moment longer than the
    caller waits for it, and the traceback of an error as long as somebody keeps the error.
    """

    def __init__(
        self,
        branch: Branch,
        params: SamplingParams,
        *,
        tree: KVTree,
        tokenizer: Tokenizer,
        num_tokens: int,
        sink: Callable[[str | None], None] | None = None,
        guide: Guide | None = None,
    ) -> None:
        tip = branch.record.tip
        super().__init__(tip, num_tokens)
        self._branch: Branch | None = branch
        self._record = branch.record
        self._finish_reason: FinishReason | None = None
        self._token_ids: tuple[int, ...] = ()
        self._tree = tree
        self._tokenizer = tokenizer
        self._start = tip.length
        self._sink = sink
        self._ends = frozenset() if params.ignore_eos else tokenizer.eos_token_ids
        self._stops = frozenset(params.stop_token_ids)
        self._sampled: list[Sampled | None] = []  # one a token; None for a forced one
        self._error: ConstraintError | None = None
        # Not the whole path: copying 32,000 tokens for each of eight branches takes longer than a step on a GPU.
        tail = tree.token_ids(tip, start=max(0, tip.length - CONTEXT_TOKENS))
        self._stream = TextStream(tokenizer, tail, params.stop)
        self.row = SampleRow.start(
            params,
            key=branch.record.key_for(params.seed),
            position=tip.length,
            prompt_ids=tree.token_ids(tip) if params.repetition_penalty != 1 else (),
            eos_token_ids=tokenizer.eos_token_ids,
            guide=guide,
        )

    def can_look_ahead(self) -> bool:
        """See `GenerateRequest`; what changes the logits of the next token has to know this one."""
        return self.num_left > 1 and self.row.is_plain

    def look_ahead(self, draw: int) -> None:
        """Makes the token that is being drawn part of the path before it is known; `accept` settles it."""
        self._tree.look_ahead(self.tip, draw)
        self.row.num_ahead = 1

    def get_ready(self) -> None:
        """Does what can be done for the next token before it is drawn."""
        self._stream.get_ready()

    def begin(self) -> FinishReason | None:
        """Takes what the constraint forces before anything is drawn; returns why the generation ends with that."""
        return self._take_forced() if self.row.guide is not None else None

    def accept(self, sampled: Sampled) -> FinishReason | None:
        """Takes the next token onto the branch; returns why the generation ends with it, if it does."""
        self.row.num_ahead = 0
        token = sampled.token_id
        if token in self._stops:
            return "stop"
        if token in self._ends:
            return "eos"
        self.num_pending = 1
        if self._take(token, sampled):
            return "stop"
        guide = self.row.guide
        if guide is not None:
            guide.advance([token])
            return self._take_forced()
        return None if self.num_left else "length"

    def give_up(self, reason: str) -> FinishReason:
        """Nothing can be drawn under the constraint: how the generation ends, here and for this branch alone."""
        guide = self.row.guide
        assert guide is not None
        if guide.may_end:
            return "stop"
        self._error = guide.error or ConstraintError(f"{guide.constraint}: {reason}")
        return "constraint"

    def finish(self, reason: FinishReason) -> None:
        """Freezes what was generated; `result` has it from here on."""
        self._tree.drop_ahead(self.tip)
        self._stream.finish()
        self._finish_reason = reason
        self._token_ids = tuple(self._tree.token_ids(self.tip, start=self._start))
        self._record.logprobs += [token.logprob for token in self._sampled if token is not None]
        self._record.guide = self.row.guide if reason == "length" else None

    @property
    def num_forced(self) -> int:
        """How many of its tokens the constraint forced."""
        return self._sampled.count(None)

    def result(self, branch: Branch) -> Generation:
        """What was generated onto `branch`, whose request this is."""
        assert self._finish_reason is not None, "the call returned before its generation ended"
        sampled = [token for token in self._sampled if token is not None]
        return Generation(
            text=self._stream.text,
            token_ids=self._token_ids,
            logprobs=tuple(token.logprob for token in sampled),
            top_logprobs=tuple(token.top for token in sampled) if self.row.params.top_logprobs else (),
            finish_reason=self._finish_reason,
            branch=branch,
            num_forced=self.num_forced,
            error=self._error,
        )

    def roll_back(self) -> None:
        """Leaves the branch as it was before the call."""
        self._tree.truncate(self.tip, self._start)

    def show_new_text(self) -> None:
        """Hands text that became safe to show to whoever watches."""
        if self._sink is not None and (text := self._stream.take()):
            self._sink(text)

    def close(self) -> None:
        """Lets go of the branch, and tells whoever watches that no more text comes; before the caller is woken."""
        self._branch = None
        if self._sink is not None:
            self._sink(None)
            self._sink = None

    def _take_forced(self) -> FinishReason | None:
        """Appends the tokens that must come next; the next step computes them together with the one before them."""
        guide = self.row.guide
        assert guide is not None
        forced = guide.forced()[: self.num_left] if self.row.params.fast_forward else []
        for token in forced:
            if self._take(token, None):
                return "stop"
        guide.advance(forced)
        self.num_pending += len(forced)
        if guide.is_complete:
            return "stop"
        if guide.error is not None:
            return self.give_up("")
        return None if self.num_left else "length"

    def _take(self, token: int, sampled: Sampled | None) -> bool:
        """Appends a token, drawn or forced; True when it completes a stop string, before which the text is cut."""
        if self.tip.num_ahead:
            self._tree.settle(self.tip, token)
        else:
            self._tree.extend(self.tip, [token])
        self._sampled.append(sampled)
        self.row.advance(token)
        self.num_left -= 1
        stops = self._stream.push(token)
        if stops:
            self._cut_at_stop()
        return stops

    def _cut_at_stop(self) -> None:
        num_kept, rest = self._stream.keep()
        self._tree.truncate(self.tip, self._start + num_kept)
        del self._sampled[num_kept:]
        if rest:
            self._tree.extend(self.tip, self._tokenizer.encode(rest))
