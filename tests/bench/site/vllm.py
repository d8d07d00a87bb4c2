"""Takes the place of vLLM, strict about what it is given: it has no model, and its tokens count up."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0-fake"


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool
    min_tokens: int = 0
    prompt_logprobs: int | None = None


class LLM:
    def __init__(
        self,
        *,
        model: str,
        load_format: str,
        skip_tokenizer_init: bool,
        dtype: str,
        max_model_len: int,
        gpu_memory_utilization: float,
        enable_prefix_caching: bool,
        max_num_seqs: int,
    ) -> None:
        assert json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        assert load_format in {"dummy", "auto"}
        assert skip_tokenizer_init
        assert enable_prefix_caching
        print("vLLM prints what it likes")
        self.max_model_len = max_model_len

    def generate(self, prompts: list[dict[str, list[int]]], params: SamplingParams, *, use_tqdm: bool) -> list[object]:
        assert params.temperature == 0.8
        assert params.ignore_eos
        assert not params.detokenize
        assert not use_tqdm
        assert all(len(prompt["prompt_token_ids"]) + params.max_tokens <= self.max_model_len for prompt in prompts)
        tokens = list(range(params.max_tokens))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]) for _ in prompts]
