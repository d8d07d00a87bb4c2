"""Peers: processes that answer tasks, say why they cannot, and leave no trace when they die."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dendrite.bench.peers.process import started
from dendrite.bench.peers.protocol import PeerError, TreeTask, TreeTimes
from dendrite.bench.peers.rivals import rivals_for
from dendrite.bench.peers.transformers_peer import generate_batch, static_loop

TASK = TreeTask([1, 2, 3, 4], num_branches=2, num_tokens=3, temperature=0.8, seed=0)
FAKE = "tests.bench.fake_peer"
ROOT = str(Path(__file__).parent.parent.parent)


@pytest.mark.parametrize("kind", ["steady", "chatty"])
def test_peer_answers_tasks(kind: str) -> None:
    """Each task gets its answer, whatever the peer's libraries print meanwhile."""
    with started("fake", FAKE, [kind], site=ROOT) as peer:
        assert peer.version == "fake 1.0"
        assert [peer.run(TASK), peer.run(TASK)] == [TreeTimes(0.04, 0.0, 2.0, 4)] * 2


def test_absent_peer_says_what_to_do() -> None:
    """A peer that cannot start is an error with its own words."""
    with (
        pytest.raises(PeerError, match="fake: it is not installed; install it"),
        started("fake", FAKE, ["absent"], site=ROOT),
    ):
        pass


def test_dying_peer_is_reported_with_its_last_words() -> None:
    """A peer that dies at its work is an error that quotes the end of its log."""
    with (
        started("fake", FAKE, ["mortal"], site=ROOT) as peer,
        pytest.raises(PeerError, match="status 3: something broke"),
    ):
        peer.run(TASK)


def test_unknown_peer_is_refused() -> None:
    """The names that exist are listed."""
    with pytest.raises(PeerError, match=r"no peer 'vllm': give hf or llama\.cpp"):
        rivals_for("any", ["vllm"], dtype="float32")


def test_llama_cpp_needs_a_file(tiny_folder: Callable[[str], Path]) -> None:
    """Without a GGUF file that is known or named, the error says how to name one."""
    with pytest.raises(PeerError, match="--gguf"):
        rivals_for(str(tiny_folder("llama")), ["llama.cpp"], dtype="float32")


@pytest.mark.parametrize("form", [generate_batch, static_loop], ids=["generate", "static"])
def test_transformers_times_every_phase(
    tiny_folder: Callable[[str], Path], form: Callable[[torch.nn.Module, TreeTask], TreeTimes]
) -> None:
    """Prefill and decode are told apart, and decoded tokens are those after the first of each branch."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32).eval()
    with torch.inference_mode():
        times = form(model, TASK)
    assert times.prefill_s > 0
    assert times.decode_s > 0
    assert times.num_decoded == 2 * 2
