"""vLLM as a peer of the suite.

python -m dendrite.bench.peers.vllm_peer '{"folder": …}'
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from types import ModuleType

from dendrite.bench.cases import TEMPERATURE
from dendrite.bench.peers.protocol import Answer, PeerError, PeerModel, serve
from dendrite.bench.peers.requests import Tokens, request_answer

MEMORY_SHARE = 0.8
"""Of the device's memory; weights and K/V together."""
MAX_BATCH = 256


class VLLM:
    """`vllm.LLM`, prompts and results as token ids."""

    def __init__(self, library: ModuleType, model: PeerModel) -> None:
        self._parameters = library.SamplingParams
        self._llm = library.LLM(
            model=model.folder,
            load_format="dummy" if model.is_random else "auto",
            skip_tokenizer_init=True,
            dtype=model.dtype,
            max_model_len=model.max_length,
            gpu_memory_utilization=MEMORY_SHARE,
            enable_prefix_caching=True,
            max_num_seqs=MAX_BATCH,
        )

    def generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        """See `RequestEngine`."""
        outs = self._run(prompts, max_tokens=num_tokens, min_tokens=num_tokens)
        return [list(out.token_ids) for request in outs for out in request.outputs]

    def score(self, prompts: Sequence[Tokens], start: int) -> None:  # noqa: ARG002 - it gives all or none
        """Log-probabilities of whole prompts, which is what there is; requests for them skip the prefix cache."""
        self._run(prompts, max_tokens=1, prompt_logprobs=1)

    def _run(self, prompts: Sequence[Tokens], **options: int) -> list:  # type: ignore[type-arg]  # vLLM's own
        parameters = self._parameters(temperature=TEMPERATURE, ignore_eos=True, detokenize=False, **options)
        outs: list = self._llm.generate(  # type: ignore[type-arg]  # as above
            [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
        )
        return outs


def start() -> tuple[str, Answer]:
    """Load the model that the command line describes."""
    model = PeerModel(**json.loads(sys.argv[1]))
    try:
        library = importlib.import_module("vllm")
    except ImportError as error:
        raise PeerError(f"vLLM cannot be imported ({error}): name a folder that has it, --peer vllm=FOLDER") from error
    engine = VLLM(library, model)
    return f"vLLM {library.__version__}", request_answer(engine, model.vocab_size)


if __name__ == "__main__":
    serve(start)
