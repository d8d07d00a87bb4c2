"""Shapes: models of random weights that the engine runs like any other, given and giving token ids."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from dendrite.bench.shapes import SHAPES, WordlessTokenizer, config_of, random_model, write_config
from dendrite.bench.subject import Subject
from dendrite.engine.errors import ModelError, RequestError


def test_shape_generates_and_scores_token_ids() -> None:
    """A shape's engine decodes branches and scores continuations; text is refused, with what to give instead."""
    with Subject(shape="tiny", device="cpu", dtype="float32", kv_memory="2MB").engine() as engine:
        root = engine.root(token_ids=list(range(10, 50)))
        outs = engine.generate(root.fork(3), max_tokens=5, temperature=0.8, ignore_eos=True)
        assert [len(out.token_ids) for out in outs] == [5, 5, 5]
        first, second = root.score([[1, 2, 3], [4, 5]])
        assert first < second < 0
        with pytest.raises(RequestError, match="give token ids"):
            root.append("text")
        with pytest.raises(ModelError, match="give token ids"):
            engine.root(messages=[{"role": "user", "content": "hello"}])
        engine.check_integrity()


def test_random_weights_have_the_spread_of_a_fresh_model() -> None:
    """Matrices are normal with a standard deviation of 0.02, norms are 1, all in the dtype that was asked for."""
    model = random_model(config_of("tiny"), dtype="bfloat16", device=torch.device("cpu"))
    for name, weights in model.named_parameters():
        assert weights.dtype == torch.bfloat16
        if "norm" in name:
            assert bool((weights == 1).all())
        else:
            assert float(weights.float().std()) == pytest.approx(0.02, rel=0.1)


def test_making_a_shape_leaves_the_random_state_alone() -> None:
    """Weights are the same each time, and a program's own random numbers are what they would have been."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = random_model(config_of("tiny"), dtype="float32", device=torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
    second = random_model(config_of("tiny"), dtype="float32", device=torch.device("cpu"))
    assert torch.equal(next(first.parameters()), next(second.parameters()))


@pytest.mark.parametrize("shape", SHAPES)
def test_peers_read_the_same_configuration(shape: str, tmp_path: Path) -> None:
    """The file for peers describes the very model that the engine runs."""
    write_config(shape, tmp_path)
    written = AutoConfig.from_pretrained(tmp_path)
    assert written.to_diff_dict() == config_of(shape).to_diff_dict()
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 500000.0


def test_unknown_shape_names_those_there_are() -> None:
    """A typing error costs no search."""
    with pytest.raises(ModelError, match=r"8b, 1b, 0\.6b, tiny"):
        config_of("7b")


@pytest.mark.parametrize("both", [{}, {"model": "m", "shape": "tiny"}], ids=["neither", "both"])
def test_subject_is_a_model_or_a_shape(both: dict[str, str]) -> None:
    """Neither and both are refused before anything is loaded."""
    with pytest.raises(ModelError, match="one of the two"):
        Subject(**both)


def test_wordless_text_is_as_long_as_its_tokens() -> None:
    """Each token is one settled character, so that the engine's text machinery has nothing to hold back."""
    tokenizer = WordlessTokenizer(100, frozenset({1}))
    assert tokenizer.decode([5, 6, 7]) == "..."


@pytest.mark.gpu
def test_shape_gives_its_memory_back() -> None:
    """A peer that starts after this engine finds the GPU as it was."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with Subject(shape="tiny", device="cuda", kv_memory="1GB").engine() as engine:
        root = engine.root(token_ids=list(range(10, 50)))
        root.generate(max_tokens=4, temperature=0.8, ignore_eos=True)
        assert torch.cuda.memory_reserved() >= before + 1_000_000_000
        del root
    left = torch.cuda.memory_reserved() - before
    assert left < 300_000_000, "what PyTorch keeps for cuBLAS and for graphs, and nothing of the pool"
