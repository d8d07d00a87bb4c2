"""The oracle: a second copy of the model that nothing of ours has touched, run by Transformers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from dendrite.engine.messages import Message


class Reference:
    """Transformers' own modules, attention and `generate` over the files of a model's folder."""

    def __init__(self, folder: Path, *, dtype: str = "float32") -> None:
        with _without_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
            )
        self._model = model.eval()
        self._model.generation_config = GenerationConfig()  # the folder's may ask for sampling or penalties
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens, with whatever the tokenizer adds by default."""
        return list(self._tokenizer(text, split_special_tokens=True)["input_ids"])

    def render(self, messages: Sequence[Message]) -> list[int]:
        """A chat's tokens, with the generation prompt."""
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """`generate`, greedy and past any end-of-text token: `num_tokens` for each prompt.

        Several prompts run as one batch, padded on the left.
        """
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])  # [num_prompts, width]
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0)
        sequences = self._model.generate(ids, attention_mask=mask, generation_config=config)
        return [[int(token) for token in row] for row in sequences[:, width:].tolist()]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], num_last: int) -> Tensor:
        """One forward over the whole path: the logits of its last positions, `[num_last, vocab_size]`.

        In float32, or in float64 where the reference runs in it.
        """
        ids = torch.tensor([list(token_ids)])
        logits: Tensor = self._model(input_ids=ids, logits_to_keep=num_last).logits[0, -num_last:]
        return logits if logits.dtype is torch.float64 else logits.float()

    def logprobs(self, context: Sequence[int], choice: Sequence[int]) -> list[float]:
        """Log-probability of each token of `choice` after `context`."""
        logits = self.logits([*context, *choice[:-1]], len(choice))
        table = torch.log_softmax(logits.double(), dim=-1)
        return table[torch.arange(len(choice)), torch.tensor(list(choice))].tolist()


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """The command has a progress line of its own."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
