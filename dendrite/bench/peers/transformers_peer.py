"""Hugging Face Transformers as a peer: `generate` as people use it, or the best loop its parts allow.

python -m dendrite.bench.peers.transformers_peer FOLDER DTYPE generate|static
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from dendrite.bench.peers.protocol import Answer, TreeTask, TreeTimes, serve, tree_answer


@runtime_checkable
class Generates(Protocol):
    """A model with `generate`, whose own annotations no checker can follow."""

    def generate(self, ids: Tensor, **options: object) -> Tensor:
        """The prompts with what follows, `[num_rows, num_tokens]`."""


class Clock(StoppingCriteria):
    """Stops nothing; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # noqa: ARG002 - as Transformers calls it
        """Note the time."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generate_batch(model: PreTrainedModel, task: TreeTask) -> TreeTimes:
    """`generate` on a batch of copies of the prompt."""
    torch.manual_seed(task.seed)
    ids = torch.tensor([task.prompt] * task.num_branches)  # [num_branches, num_prompt]
    config = GenerationConfig(
        do_sample=True,
        temperature=task.temperature,
        top_k=0,
        max_new_tokens=task.num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    clock = Clock()
    assert isinstance(model, Generates)
    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    done = time.perf_counter()
    first = clock.times[0]
    return TreeTimes(first - began, 0.0, done - first, task.num_branches * (task.num_tokens - 1))


def static_loop(model: PreTrainedModel, task: TreeTask) -> TreeTimes:
    """The prompt once, its K/V copied into a static cache of all branches, then one forward a token."""
    torch.manual_seed(task.seed)
    ids = torch.tensor([task.prompt])  # [1, num_prompt]
    num_prompt = ids.shape[1]
    began = time.perf_counter()
    prompt_cache = DynamicCache(config=model.config)
    logits: Tensor = model(input_ids=ids, past_key_values=prompt_cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    prefilled = time.perf_counter()
    cache = StaticCache(config=model.config, max_cache_len=num_prompt + task.num_tokens)
    for index, layer in enumerate(prompt_cache.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        shape = (task.num_branches, -1, -1, -1)
        cache.update(layer.keys.expand(shape), layer.values.expand(shape), index)
    copied = time.perf_counter()
    tokens = _draw(logits.expand(task.num_branches, -1), task.temperature)
    for position in range(num_prompt, num_prompt + task.num_tokens - 1):
        positions = torch.full((task.num_branches, 1), position)
        logits = model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens = _draw(logits, task.temperature)
    done = time.perf_counter()
    num_decoded = task.num_branches * (task.num_tokens - 1)
    return TreeTimes(prefilled - began, copied - prefilled, done - copied, num_decoded)


def _draw(logits: Tensor, temperature: float) -> Tensor:
    """One token a row, `[num_rows, 1]`, by inverse CDF: a quarter of the time of `torch.multinomial` on a CPU."""
    cumulated = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1)
    return torch.searchsorted(cumulated, torch.rand(len(cumulated), 1) * cumulated[:, -1:]).clamp_(
        max=logits.shape[-1] - 1
    )


FORMS: dict[str, Callable[[PreTrainedModel, TreeTask], TreeTimes]] = {
    "generate": generate_batch,
    "static": static_loop,
}


def main(folder: str, dtype: str, form: str) -> None:
    """Load, then answer tasks until the input ends."""

    def start() -> tuple[str, Answer]:
        transformers.utils.logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
        ).eval()
        model.generation_config = GenerationConfig()
        run = FORMS[form]

        def repetition(task: TreeTask) -> TreeTimes:
            with torch.inference_mode():
                return run(model, task)

        repetition(TreeTask([1] * 8, 2, 4, 1.0, 0))
        return transformers.__version__, tree_answer(repetition)

    serve(start)


if __name__ == "__main__":
    main(*sys.argv[1:])
