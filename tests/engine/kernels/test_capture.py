"""A whole step in a CUDA graph: what it computes when replayed is what it computes eagerly."""

from __future__ import annotations

import pytest
import torch

from dendrite.engine.attention.base import AttentionBackend, AttentionStep
from dendrite.engine.attention.interface import ATTENTION_NAME, register_attention
from dendrite.engine.batch import Plan
from dendrite.engine.kv_pool import KVPool
from tests.engine.packed_tree import spec_of
from tests.models_zoo import VOCAB_SIZE, tiny_config, tiny_model

NUM_ROWS = 3


class OwnValues(AttentionBackend):
    """Every row attends to itself alone, so that its output is its value, read back from the pool."""

    slots: torch.Tensor

    def prepare(self, plan: Plan) -> None: ...

    def run(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        values = self.pool.layers[layer][1].index_select(1, self.slots).transpose(0, 1)
        return values.repeat_interleave(query.shape[1] // values.shape[1], 1)


@pytest.mark.gpu
@pytest.mark.parametrize("is_filtered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_gives_what_the_step_gives(is_filtered: bool, dtype: torch.dtype) -> None:
    """Forward, head and draw are captured; new ids, positions, slots and keys in their buffers give new results."""
    from dendrite.engine.passes.fused import make_fused
    from dendrite.engine.sampling_device import DrawParams, Draws, draw_tokens

    register_attention()
    device = torch.device("cuda")
    config = tiny_config("qwen3", hidden_size=128, intermediate_size=256)
    model = tiny_model(config, device=device, dtype=dtype)
    spec = spec_of(model)
    model.set_attn_implementation(ATTENTION_NAME)
    make_fused(model)
    pool = KVPool(spec, num_blocks=8, block_size=4, device=device)
    pool.data = pool.data.to(dtype)
    pool.layers = tuple(pool.data)
    backend = OwnValues(pool, spec)
    ids, positions, slots = (torch.zeros(NUM_ROWS, dtype=torch.int64, device=device) for _ in range(3))
    backend.slots = slots
    params = DrawParams.empty(NUM_ROWS, device)
    params.top_ks.fill_(20)

    def step() -> Draws:
        hidden = model.get_decoder()(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            dendrite_step=AttentionStep(backend, slots),
        ).last_hidden_state[0]
        return draw_tokens(model.lm_head(hidden), params, filtered=is_filtered)

    with torch.inference_mode():
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step()
        seen = set()
        for _ in range(10):
            ids.random_(VOCAB_SIZE)
            positions.random_(200)
            slots.copy_(torch.randperm(32, device=device)[:NUM_ROWS])
            params.temperatures.uniform_(0, 1.5)
            params.keys.random_()
            for output in (replayed.tokens, replayed.logprobs, replayed.normalizers):
                output.fill_(99)
            graph.replay()
            eager = step()
            torch.testing.assert_close(replayed.tokens, eager.tokens)
            torch.testing.assert_close(replayed.logprobs, eager.logprobs)
            torch.testing.assert_close(replayed.normalizers, eager.normalizers)
            seen.add(tuple(replayed.tokens.tolist()))
        assert len(seen) > 1
