"""The runner and the head of CUDA devices without a device: the same code, kernels interpreted, no graphs."""

from __future__ import annotations

import pytest

from dendrite.engine.config import EngineConfig
from dendrite.engine.engine import Engine
from dendrite.engine.head import Head
from dendrite.engine.models import load_model
from dendrite.engine.runner import Runner, TorchRunner
from dendrite.engine.text import HFTokenizer
from tests.models_zoo import save_tiny_model, tiny_config

HEAD_DIM = 32
PROMPT = [7, 19, 4, 250, 33, 8, 91, 17, 65, 2, 40]


@pytest.fixture(scope="module")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama whose heads the kernels take."""
    config = tiny_config("llama", head_dim=HEAD_DIM, hidden_size=4 * HEAD_DIM, num_hidden_layers=2)
    return str(save_tiny_model(tmp_path_factory.mktemp("llama"), config))


def opened(folder: str, *, as_device: bool) -> Engine:
    """An engine on the CPU, with the parts of a device or with the CPU's."""
    loaded = load_model(folder, dtype="float32", device="cpu")
    tokenizer = HFTokenizer(loaded.tokenizer, loaded.eos_token_ids)
    config = EngineConfig.of(dtype="float32", device="cpu", kv_memory="2MiB", block_size=4)
    runner: Runner
    head: Head
    if as_device:
        from dendrite.engine.cuda_runner import CudaRunner
        from dendrite.engine.device_head import DeviceHead

        device_runner = CudaRunner(loaded.model, loaded.spec, kv_memory=config.kv_memory, block_size=4)
        runner, head = device_runner, DeviceHead(device_runner)
    else:
        runner = TorchRunner(loaded.model, loaded.spec, kv_memory=config.kv_memory, block_size=4)
        head = Head(runner)
    return Engine(runner, tokenizer, config, head)


def texts(engine: Engine) -> list[object]:
    """Tokens and scores of a small search: suffixes of several lengths, forks, filters, penalties, a stop, `at`."""
    with engine:
        root = engine.root(token_ids=PROMPT, seed=11)
        children = root.fork(3)
        for length, child in enumerate(children):
            child.append(PROMPT[: length + 1])
        engine.generate(children, max_tokens=3, ignore_eos=True, temperature=0.9)
        forks = children[0].fork(2)
        engine.generate(forks, max_tokens=3, ignore_eos=True, temperature=1.0, top_p=0.8, top_k=30)
        past = forks[1].fork(2, at=9)
        engine.generate(past, max_tokens=4, presence_penalty=0.7)
        stopped = children[1].generate(max_tokens=6, stop_token_ids=[children[1].token_ids[5]])
        scores = [round(value, 3) for value in past[0].score(["a", "b c", "q"])]
        found: list[object] = [branch.token_ids for branch in (*children, *forks, *past)]
        for branch in (*children, *forks, *past, root):
            branch.prune()
        engine.check_integrity()
        assert engine.stats().blocks_used == 0
        return [*found, stopped.finish_reason, scores]


def test_the_device_parts_give_what_the_cpu_gives(kernel_folder: str) -> None:
    """Looking ahead, through the tree kernel and the device's draws: the same tokens, float32."""
    assert texts(opened(kernel_folder, as_device=True)) == texts(opened(kernel_folder, as_device=False))
