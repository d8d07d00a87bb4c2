"""SGLang as a peer of the suite.

python -m dendrite.bench.peers.sglang_peer '{"folder": …}'
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

MEMORY_SHARE = 0.75
"""Of the device's memory; weights and K/V together."""
MAX_BATCH = 256


class SGLang:
    """`sglang.Engine`, prompts and results as token ids."""

    def __init__(self, library: ModuleType, model: PeerModel) -> None:
        self._engine = library.Engine(
            model_path=model.folder,
            load_format="dummy" if model.is_random else "auto",
            skip_tokenizer_init=True,
            dtype=model.dtype,
            context_length=model.max_length,
            mem_fraction_static=MEMORY_SHARE,
            max_running_requests=MAX_BATCH,
            attention_backend="flashinfer",
            sampling_backend="flashinfer",
            log_level="error",
        )

    def generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        """See `RequestEngine`."""
        options = {"temperature": TEMPERATURE, "max_new_tokens": num_tokens, "ignore_eos": True}
        outs = self._engine.generate(input_ids=list(prompts), sampling_params=options)
        return [list(out["output_ids"]) for out in ([outs] if isinstance(outs, dict) else outs)]

    def score(self, prompts: Sequence[Tokens], start: int) -> None:
        """Log-probabilities from `start` on, so that the prefix may come from the cache."""
        options = {"temperature": TEMPERATURE, "max_new_tokens": 1, "ignore_eos": True}
        self._engine.generate(
            input_ids=list(prompts), sampling_params=options, return_logprob=True, logprob_start_len=start
        )


def start() -> tuple[str, Answer]:
    """Load the model that the command line describes."""
    model = PeerModel(**json.loads(sys.argv[1]))
    try:
        library = importlib.import_module("sglang")
    except ImportError as error:
        raise PeerError(
            f"SGLang cannot be imported ({error}): name a folder that has it, --peer sglang=FOLDER"
        ) from error
    engine = SGLang(library, model)
    return f"SGLang {library.__version__}", request_answer(engine, model.vocab_size)


if __name__ == "__main__":
    serve(start)
