"""A tree of random tokens run through a runner in several packed steps, and what plain sequences give for its paths."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dendrite.engine.attention.interface import ATTENTION_NAME, register_attention
from dendrite.engine.batch import Batch, Plan, Segment
from dendrite.engine.runner import Runner, TorchRunner
from dendrite.engine.spec import ModelSpec
from tests.models_zoo import CONTEXT_LENGTH, VOCAB_SIZE, tiny_model


@dataclass
class TokenNode:
    """Tokens after a parent's, with blocks of their own; the first `num_done` have their K/V in the pool."""

    tokens: list[int]
    position: int
    slots: list[int]
    children: list[TokenNode] = field(default_factory=list)
    num_done: int = 0
    hidden: list[Tensor] = field(default_factory=list)


class PackedTree:
    """Builds batches by hand, as small as the definition of `Batch` allows."""

    def __init__(self, runner: Runner, rng: random.Random, *, depth: int = 3) -> None:
        self._runner = runner
        self._rng = rng
        self._free = list(range(1, runner.num_blocks + 1))
        rng.shuffle(self._free)
        self.root = self._grow(0, depth)

    def run(self, chunk_size: int) -> None:
        """Run steps of up to `chunk_size` rows each until every token is done."""
        while self._step(chunk_size):
            pass

    def paths(self) -> list[tuple[list[int], Tensor]]:
        """Every root-to-leaf path: its tokens, and the hidden states the runner gave, [num_tokens, hidden_size]."""
        return [(tokens, torch.stack(hidden)) for tokens, hidden in _paths(self.root, [], [])]

    def _grow(self, position: int, depth: int) -> TokenNode:
        length = self._rng.choice([1, 1, 2, 5, 17, 30])
        tokens = [self._rng.randrange(VOCAB_SIZE) for _ in range(length)]
        size = self._runner.block_size
        blocks = [self._free.pop() for _ in range(-(-length // size))]
        node = TokenNode(tokens, position, [block * size + i for block in blocks for i in range(size)][:length])
        if depth:
            node.children = [self._grow(position + length, depth - 1) for _ in range(self._rng.randint(1, 3))]
        return node

    def _step(self, chunk_size: int) -> bool:
        rows: list[tuple[TokenNode, int]] = []
        segments: list[Segment] = []
        self._visit(self.root, chunk_size, rows, segments, is_reachable=True)
        if not rows:
            return False
        self._rng.shuffle(segments)
        order = self._rng.sample(range(len(rows)), len(rows))
        hidden = self._runner.run(
            Batch(
                token_ids=[node.tokens[index] for node, index in rows],
                positions=[node.position + index for node, index in rows],
                slots=[node.slots[index] for node, index in rows],
                plan=Plan(len(rows), tuple(segments)),
                copies=[],
                output_rows=order,
            )
        )
        for (node, _), state in zip(rows, hidden[torch.tensor(order).argsort()], strict=True):
            node.hidden.append(state)
            node.num_done += 1
        return True

    def _visit(
        self,
        node: TokenNode,
        left: int,
        rows: list[tuple[TokenNode, int]],
        segments: list[Segment],
        *,
        is_reachable: bool,
    ) -> None:
        start = len(rows)
        num_new = min(left - start, len(node.tokens) - node.num_done) if is_reachable else 0
        rows.extend((node, node.num_done + index) for index in range(num_new))
        num_keys = node.num_done + num_new
        for child in node.children:
            self._visit(child, left, rows, segments, is_reachable=is_reachable and num_keys == len(node.tokens))
        if len(rows) > start:
            spans = tuple((slot, slot + 1) for slot in node.slots[:num_keys])
            segments.append(Segment(spans, num_keys, start, len(rows), num_new))


def _paths(node: TokenNode, tokens: list[int], hidden: list[Tensor]) -> list[tuple[list[int], list[Tensor]]]:
    tokens, hidden = tokens + node.tokens, hidden + node.hidden
    return [path for child in node.children for path in _paths(child, tokens, hidden)] or [(tokens, hidden)]


def make_runner(config: PreTrainedConfig, *, num_blocks: int = 400, block_size: int = 4) -> TorchRunner:
    """A runner of the tiny model of that configuration."""
    register_attention()
    model = tiny_model(copy.deepcopy(config))  # the attention is set in the configuration itself
    spec = spec_of(model)
    model.set_attn_implementation(ATTENTION_NAME)
    return TorchRunner(
        model, spec, kv_memory=(num_blocks + 1) * block_size * spec.bytes_per_token, block_size=block_size
    )


def spec_of(model: PreTrainedModel) -> ModelSpec:
    """The dimensions of a tiny model."""
    config = model.config
    return ModelSpec(
        name=config.model_type,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden_size=config.hidden_size,
        vocab_size=VOCAB_SIZE,
        context_length=CONTEXT_LENGTH,
        dtype="float32",
    )


def plain(model: PreTrainedModel, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Transformers' own forward of one sequence: final hidden states and logits."""
    states: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
    hook.remove()
    return states[0][0], logits[0]
