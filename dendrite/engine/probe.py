"""A forward at load time that shows whether a model runs exactly: a small tree, packed, beside plain sequences.

prefix ──┬── left       packed: prefix, left, right in one row, each branch reading the prefix and itself
         └── right      plain:  prefix + left and prefix + right, each alone, with Transformers' own attention
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dendrite.engine.attention.base import AttentionStep
from dendrite.engine.attention.interface import ATTENTION_NAME, STEP_KEYWORD
from dendrite.engine.attention.reference import ReferenceAttention
from dendrite.engine.batch import Plan, Segment
from dendrite.engine.errors import ModelError
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec

PREFIX, BRANCH = 4, 5
"""Tokens of the shared part, and of each of the two branches."""
NUM_ROWS = PREFIX + 2 * BRANCH
FIRST_SLOT = NUM_ROWS
"""One block as large as the whole tree, after the trash block of the same size."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.03}
"""How far a row's final hidden state may be off, as a part of its length. SmolLM2-135M: 1e-6 in float32, 0.03 in
bfloat16, 0.003 in float16; a row that reads its neighbour branch too: around 1."""


def probe(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Run the tree both ways and compare the decoder's final hidden states.

    The packed run calls the decoder as the runner does; the plain one calls the whole model as `generate` does, so that
    anything the model does on the way to its decoder is compared as well.

    Args:
        model: in eval mode, its attention set to ours.
        spec: the model's dimensions, as read from its configuration.

    Raises:
        ModelError: a layer did not call attention exactly once with the step, or the states differ.
    """
    tokens = _tokens(spec.vocab_size, model.device)
    family = model.config.model_type
    with torch.inference_mode():
        left, right = _plain(model, tokens)
        try:
            packed = _packed(model, spec, tokens)
        except ModelError as error:
            raise ModelError(f"{family} models like this one would not run exactly: {error}") from error
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ModelError(f"{family} models like this one cannot be run: {error}") from error
    if not torch.isfinite(packed).all():
        raise ModelError(f"this {family} model computes NaN or infinity: damaged weights, or {spec.dtype} overflows")
    branches = {"first": (packed[:-BRANCH], left), "second": (packed[-BRANCH:], right[PREFIX:])}
    for name, (ours, reference) in branches.items():
        _compare(family, spec.dtype, name, ours, reference)


def _tokens(vocab_size: int, device: torch.device) -> Tensor:
    """[NUM_ROWS] token ids, spread over the vocabulary, the same each time."""
    return (torch.arange(1, NUM_ROWS + 1, device=device) * 7919) % vocab_size


def _plain(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Both branches by Transformers' own attention: final hidden states, [2, PREFIX + BRANCH, hidden_size]."""
    prefix, left, right = tokens.split((PREFIX, BRANCH, BRANCH))
    rows = torch.stack((torch.cat((prefix, left)), torch.cat((prefix, right))))
    states: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    try:
        with _attention(model, "eager"):
            model(input_ids=rows, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return states[0].float()


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _packed(model: PreTrainedModel, spec: ModelSpec, tokens: Tensor) -> Tensor:
    """The packed tree's final hidden states, [NUM_ROWS, hidden_size]."""
    pool = KVPool(spec, num_blocks=1, block_size=NUM_ROWS, device=model.device)
    backend = ReferenceAttention(pool, spec)
    backend.prepare(_plan())
    step = AttentionStep(backend, torch.arange(FIRST_SLOT, FIRST_SLOT + NUM_ROWS, device=model.device))
    positions = [*range(PREFIX + BRANCH), *range(PREFIX, PREFIX + BRANCH)]
    output = model.get_decoder()(
        input_ids=tokens.unsqueeze(0),
        position_ids=torch.tensor([positions], device=model.device),
        use_cache=False,
        **{STEP_KEYWORD: step},
    )
    step.check_complete(spec.num_layers)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden.float()


def _plan() -> Plan:
    right_row = PREFIX + BRANCH
    prefix = _segment(0, NUM_ROWS, num_keys=PREFIX)
    return Plan(
        NUM_ROWS, (prefix, _segment(PREFIX, right_row, num_keys=BRANCH), _segment(right_row, NUM_ROWS, num_keys=BRANCH))
    )


def _segment(row_start: int, row_end: int, *, num_keys: int) -> Segment:
    first = FIRST_SLOT + row_start
    return Segment(((first, first + num_keys),), num_keys, row_start, row_end, causal_rows=num_keys)


def _compare(family: str, dtype: str, branch: str, ours: Tensor, reference: Tensor) -> None:
    errors = torch.linalg.vector_norm(ours - reference, dim=1) / torch.linalg.vector_norm(reference, dim=1)
    # In half precision a near tie between two experts may go either way and change a row; not half of the rows.
    error = float(errors.max() if dtype == "float32" else errors.median())
    if error > TOLERANCE[dtype]:
        raise ModelError(
            f"{family} models like this one would not run exactly: a packed tree's {branch} branch is "
            f"{error:.1e} off Transformers' own ({dtype}, {TOLERANCE[dtype]:.0e} is allowed)"
        )
