"""An engine that says what a script tells it to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # unit tests of decorated functions import this package and need no torch
    from dendrite.engine.engine import Engine

Reply = str | Sequence[str] | Mapping[str, float]
"""What the model says next: one text, several that are equally likely, or texts with their weights."""
Script = Callable[[str], Reply]
"""From the text so far, with turns marked as `<|user|>…<|end|><|assistant|>`, to what the model says next.

It is asked often, for prompts that nobody expects an answer to as well, so it must be pure and answer every text.
"""


def scripted_engine(
    script: Script,
    *,
    num_blocks: int = 4096,
    block_size: int = 4,
    context_length: int = 16_384,
    seed: int = 0,
    swap_memory: int | None = None,
    swap_disk: int = 0,
    integrity: str = "off",
    prefix_cache: Path | None = None,
) -> Engine:
    r"""A real engine whose model follows a script, a byte a token, and then ends its text.

        def script(text: str) -> list[str] | str:
            if text.endswith("Step:"):
                return [" left\n", " right\n"]        # sampled at temperature 1, the first one at 0
            return {" yes": 0.9, " no": 0.1} if text.endswith("good?") else " well"

        with scripted_engine(script) as engine:
            ...

    Scores follow the script too: a label's probability is that of the replies that start with it.

    Args:
        script: what the model says.
        num_blocks: K/V blocks in the pool; few of them show what a program does when memory ends.
        block_size: tokens in a block; small, so that copy-on-write happens in small tests.
        context_length: most tokens of a path.
        seed: of roots without one of their own.
        swap_memory: bytes for what is moved out of the pool, 8 a token; None is four pools.
        swap_disk: bytes of files for what does not fit there.
        integrity: as for `Engine.load`.
        prefix_cache: as for `Engine.load`.
    """
    from dendrite.engine.config import EngineConfig  # noqa: PLC0415 - with the engine comes torch
    from dendrite.engine.engine import Engine  # noqa: PLC0415 - as above
    from dendrite.testing.runner import ScriptedRunner  # noqa: PLC0415 - as above
    from dendrite.testing.tokenizer import ByteTokenizer  # noqa: PLC0415 - as above

    runner = ScriptedRunner(script, num_blocks=num_blocks, block_size=block_size, context_length=context_length)
    return Engine(
        runner,
        ByteTokenizer(),
        EngineConfig.of(
            block_size=block_size,
            seed=seed,
            swap_memory=swap_memory,
            swap_disk=swap_disk,
            integrity=integrity,
            prefix_cache=prefix_cache,
        ),
    )
