"""Takes the place of SGLang, strict about what it is given: it has no model, and its tokens count up."""

import json
import os
from pathlib import Path

__version__ = "0.0-fake"


class Engine:
    def __init__(
        self,
        *,
        model_path: str,
        load_format: str,
        skip_tokenizer_init: bool,
        dtype: str,
        context_length: int,
        mem_fraction_static: float,
        max_running_requests: int,
        attention_backend: str,
        sampling_backend: str,
        log_level: str,
    ) -> None:
        assert json.loads((Path(model_path) / "config.json").read_text())["vocab_size"]
        assert load_format in {"dummy", "auto"}
        assert skip_tokenizer_init
        if os.environ.get("FAKE_SGLANG") == "refuses":
            raise RuntimeError("no GPU was found")

    def generate(
        self,
        *,
        input_ids: list[list[int]],
        sampling_params: dict[str, object],
        return_logprob: bool = False,
        logprob_start_len: int = -1,
    ) -> list[dict[str, object]] | dict[str, object]:
        if os.environ.get("FAKE_SGLANG") == "dies":
            os._exit(7)
        assert sampling_params["temperature"] == 0.8
        assert sampling_params["ignore_eos"]
        assert not return_logprob or 0 < logprob_start_len < len(input_ids[0])
        outs: list[dict[str, object]] = [
            {"output_ids": list(range(int(str(sampling_params["max_new_tokens"]))))} for _ in input_ids
        ]
        return outs[0] if len(outs) == 1 else outs
