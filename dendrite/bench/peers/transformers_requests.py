"""Hugging Face Transformers as a peer of the suite: `generate` on a batch, as people use it.

python -m dendrite.bench.peers.transformers_requests '{"folder": …}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from dendrite.bench.cases import TEMPERATURE
from dendrite.bench.peers.protocol import Answer, PeerError, PeerModel, serve
from dendrite.bench.peers.requests import Tokens, request_answer
from dendrite.bench.peers.transformers_peer import Generates


class Transformers:
    """A model whose every call computes its prompts anew."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.generation_config = GenerationConfig()
        self._model = model

    def generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        """See `RequestEngine`; all prompts of a case are of one length, so nothing is padded."""
        ids = torch.tensor(prompts, device=self._model.device)  # [num_prompts, num_tokens]
        config = GenerationConfig(
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert isinstance(self._model, Generates)
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        found: list[Tokens] = out[:, ids.shape[1] :].tolist()
        return found

    def score(self, prompts: Sequence[Tokens], start: int) -> None:  # noqa: ARG002 - there is no way to do it
        """Refuse: `generate` gives no log-probabilities of prompts."""
        raise PeerError("`generate` gives no log-probabilities of prompts")


def load(model: PeerModel) -> PreTrainedModel:
    """The model on its device, from its weights or with random ones."""
    dtype = getattr(torch, model.dtype)
    if model.is_random:
        with torch.device(model.device):
            config = AutoConfig.from_pretrained(model.folder, local_files_only=True)
            made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    else:
        made = AutoModelForCausalLM.from_pretrained(
            model.folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        ).to(device=model.device)  # type: ignore[call-arg]  # its `self` is mistyped
    made.eval()
    return made


def start() -> tuple[str, Answer]:
    """Load the model that the command line describes."""
    transformers.utils.logging.disable_progress_bar()
    model = PeerModel(**json.loads(sys.argv[1]))
    return f"transformers {transformers.__version__}", request_answer(Transformers(load(model)), model.vocab_size)


if __name__ == "__main__":
    serve(start)
