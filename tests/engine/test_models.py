import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig

from dendrite.engine.errors import ModelError
from dendrite.engine.models import _THREADS, load_model
from dendrite.engine.probe import probe
from dendrite.engine.structure import check_modules
from tests.models_zoo import CONTEXT_LENGTH, EXACT, EXPERTS, VOCAB_SIZE, family_config, save_tiny_model, tiny_config

SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "dynamic rope": (
        lambda: tiny_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope of type dynamic",
    ),
    "longrope": (
        lambda: tiny_config(
            "phi3", rope_parameters={**LONGROPE, "original_max_position_embeddings": 64}, sliding_window=None
        ),
        "rope of type longrope",
    ),
    "a sliding window": (lambda: tiny_config("mistral", sliding_window=64), "sliding window of 64 tokens"),
    "layers with a window": (
        lambda: tiny_config("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
        "some layers are sliding_attention",
    ),
    "gpt-oss": (
        lambda: tiny_config("gpt_oss", num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_theta": 1e4}),
        "sinks",
    ),
    "gemma2": (lambda: tiny_config("gemma2", layer_types=["full_attention"] * 3), "scores are capped"),
    "gemma3": (lambda: tiny_config("gemma3_text"), "some layers are sliding_attention"),
    "mamba": (lambda: family_config("mamba", {**SMALL, "state_size": 8}), "recurrent state"),
    "jamba": (
        lambda: tiny_config("jamba", num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1),
        "recurrent state",
    ),
    "recurrent gemma": (lambda: tiny_config("recurrent_gemma"), "recurrent state"),
    "stablelm": (lambda: tiny_config("stablelm"), "drops the keywords that carry the plan"),
    "bloom": (lambda: family_config("bloom", {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_head": 4}), "ALiBi"),
    "falcon": (lambda: family_config("falcon", SMALL), "eager code of its own"),
    "gpt-j": (
        lambda: family_config("gptj", {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        "eager code of its own",
    ),
    "gpt-neo": (
        lambda: family_config(
            "gpt_neo", {**SMALL, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "num_layers": 2}
        ),
        "locally",
    ),
    "xglm": (
        lambda: family_config("xglm", {"vocab_size": VOCAB_SIZE, "d_model": 32, "num_layers": 2, "attention_heads": 4}),
        "attention interface",
    ),
    "deepseek": (
        lambda: tiny_config(
            "deepseek_v3", **LATENT, n_routed_experts=4, n_group=1, topk_group=1, num_key_value_heads=4
        ),
        "latent",
    ),
    "llama4": (lambda: tiny_config("llama4_text", num_local_experts=2, num_experts_per_tok=1), "chunks of"),
    "t5": (lambda: family_config("t5", {"vocab_size": VOCAB_SIZE, "d_model": 32}), "not a decoder-only"),
    "bart": (lambda: family_config("bart", {"vocab_size": VOCAB_SIZE, "d_model": 32}), "not a decoder-only"),
    "quantised": (
        lambda: tiny_config("llama", quantization_config={"quant_method": "awq", "bits": 4}),
        "weights are quantised",
    ),
}


@pytest.mark.parametrize("family", EXACT)
def test_families_with_full_attention_load(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """A tiny random model of each supported family passes the structural check and the probe."""
    folder = tiny_folder(family)
    loaded = load_model(str(folder))
    assert loaded.spec.name == folder.name
    assert loaded.spec.dtype == "float32"
    assert (loaded.spec.num_layers, loaded.spec.num_heads, loaded.spec.head_dim) == (3, 4, 8)
    assert (loaded.spec.vocab_size, loaded.spec.context_length) == (VOCAB_SIZE, CONTEXT_LENGTH)
    assert loaded.eos_token_ids == {1}
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2-moe"])
def test_half_precision_passes_the_probe(family: str, dtype: str, tiny_folder: Callable[[str], Path]) -> None:
    """Rounding alone, a different expert on a near tie included, is no reason to refuse."""
    assert load_model(str(tiny_folder(family)), dtype=dtype).spec.dtype == dtype


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_silently_wrong_is_refused(case: str, tmp_path: Path) -> None:
    """Each family or option beyond full causal attention is refused by name, with the reason."""
    make, reason = REFUSED[case]
    config = make()
    folder = save_tiny_model(
        tmp_path, tiny_config("llama")
    )  # refused by its configuration, before the weights are read
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=reason) as refusal:
        load_model(str(folder))
    assert config.model_type in str(refusal.value)


def test_bidirectional_layers_are_refused(tmp_path: Path) -> None:
    """BERT's language-model head loads as a causal model, but its layers look ahead."""
    config = family_config("bert", {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64})
    with pytest.raises(ModelError, match="attends in both directions"):
        load_model(str(save_tiny_model(tmp_path, config)))


def test_sinks_are_refused_by_their_parameters(tmp_path: Path) -> None:
    """A family nobody has named yet is refused if its layers hold sinks."""
    loaded = load_model(str(save_tiny_model(tmp_path, tiny_config("llama"))))
    layer = loaded.model.get_submodule("model.layers.1.self_attn")
    layer.register_parameter("sinks", nn.Parameter(torch.zeros(4)))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.sinks"):
        check_modules(loaded.model)


def test_a_window_as_long_as_the_context_is_no_window(tmp_path: Path) -> None:
    """A sliding window that can never hide a token does not keep a model out."""
    config = tiny_config("mistral", sliding_window=CONTEXT_LENGTH)
    assert load_model(str(save_tiny_model(tmp_path, config))).model.config.sliding_window is None


def test_experts_are_not_mistaken_for_layers(tmp_path: Path) -> None:
    """A mixture of experts calls attention once for each layer, whatever experts it runs."""
    config = tiny_config("qwen3_moe", **EXPERTS)
    assert load_model(str(save_tiny_model(tmp_path, config))).spec.num_layers == 3


# --- the probe -----------------------------------------------------------------------------------------------------


class PackedPositions(nn.Module):
    """A rope that counts rows instead of reading positions, as some models' own code does."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos_and_sin: tuple[Tensor, Tensor] = self.rope(hidden, torch.arange(position_ids.shape[1]).unsqueeze(0))
        return cos_and_sin


class DropsKeywords(nn.Module):
    """An attention layer that passes on what it knows and nothing else."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, position_embeddings: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = self.attention(
            hidden_states=hidden_states, position_embeddings=position_embeddings
        )
        return output


def test_the_probe_sees_ignored_positions(tiny_folder: Callable[[str], Path]) -> None:
    """A model that does not use the positions it is given differs in the second branch only, and is refused."""
    loaded = load_model(str(tiny_folder("llama")))
    decoder = loaded.model.get_submodule("model")
    decoder.register_module("rotary_emb", PackedPositions(decoder.get_submodule("rotary_emb")))
    with pytest.raises(ModelError, match="second branch"):
        probe(loaded.model, loaded.spec)


def test_the_probe_sees_a_layer_that_runs_twice(tiny_folder: Callable[[str], Path]) -> None:
    """Each layer has to attend exactly once, in order."""
    loaded = load_model(str(tiny_folder("llama")))
    layers = loaded.model.get_submodule("model.layers")
    layers.register_module("2", layers.get_submodule("1"))
    with pytest.raises(ModelError, match="would not run exactly"):
        probe(loaded.model, loaded.spec)


def test_the_probe_sees_dropped_keywords(tiny_folder: Callable[[str], Path]) -> None:
    """A layer that does not pass the step on is refused, not run with some other attention."""
    loaded = load_model(str(tiny_folder("llama")))
    layer = loaded.model.get_submodule("model.layers.1")
    layer.register_module("self_attn", DropsKeywords(layer.get_submodule("self_attn")))
    with pytest.raises(ModelError, match="without a plan"):
        probe(loaded.model, loaded.spec)


def test_the_probe_sees_numbers_that_are_not_finite(tiny_folder: Callable[[str], Path]) -> None:
    """Damaged weights that still have the right shape are refused."""
    loaded = load_model(str(tiny_folder("llama")))
    loaded.model.get_parameter("model.embed_tokens.weight").fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN or infinity"):
        probe(loaded.model, loaded.spec)


# --- what is loaded ------------------------------------------------------------------------------------------------


def test_auto_never_rounds_float32_weights(tiny_folder: Callable[[str], Path]) -> None:
    """`auto` keeps float32 weights in float32 on every machine."""
    assert load_model(str(tiny_folder("llama")), dtype="auto").model.dtype == torch.float32


@pytest.mark.parametrize("native, expected", [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_bfloat16_where_it_is_native(
    native: bool,
    expected: str,
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 weights run as they are on a CPU that computes in bfloat16, in float32 on others."""
    loaded = load_model(str(tiny_folder("llama")), dtype="bfloat16")
    AutoModelForCausalLM.from_config(loaded.model.config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert load_model(str(tmp_path)).spec.dtype == expected


def test_every_end_token_is_known(tmp_path: Path) -> None:
    """End tokens come from the generation configuration, the configuration and the tokenizer together."""
    folder = save_tiny_model(tmp_path, tiny_config("llama", eos_token_id=5))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert load_model(str(folder)).eos_token_ids == {1, 5, 6, 7}


def test_weights_hash_follows_the_weights(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """Equal weights have equal hashes wherever they lie; one changed weight changes the hash."""
    original = load_model(str(tiny_folder("llama")))
    copied = shutil.copytree(tiny_folder("llama"), tmp_path / "copy")
    assert load_model(str(copied)).weights_hash == original.weights_hash
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert load_model(str(copied)).weights_hash != original.weights_hash


def test_one_thread_is_for_loading_only(tiny_folder: Callable[[str], Path]) -> None:
    """Loading leaves the number of threads as it was, also when it refuses."""
    before = torch.get_num_threads()
    load_model(str(tiny_folder("llama")))
    with pytest.raises(ModelError):
        load_model(str(tiny_folder("llama")), dtype="float64")
    assert torch.get_num_threads() == before


def test_unknown_dtype_and_device_are_refused(tiny_folder: Callable[[str], Path]) -> None:
    """Both messages say what may be given."""
    with pytest.raises(ModelError, match="float32, bfloat16, float16"):
        load_model(str(tiny_folder("llama")), dtype="int8")
    with pytest.raises(ModelError, match="auto, cpu or cuda"):
        load_model(str(tiny_folder("llama")), device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test says is missing")
def test_cuda_without_a_device_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    """Asking for a GPU that is not there names the way out."""
    with pytest.raises(ModelError, match="use device='cpu'"):
        load_model(str(tiny_folder("llama")), device="cuda")


def test_text_is_split_as_the_tokenizers_file_says(tmp_path: Path) -> None:
    """A class name in the configuration that stands for another split does not change a single token."""
    folder = save_tiny_model(tmp_path, tiny_config("llama"))
    published = Tokenizer.from_file(str(folder / "tokenizer.json"))
    published.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    published.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_model(str(folder)).tokenizer
    assert "Digits" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    for text in ["  12 34", "x  = 20\n\n 3.5", "step by step"]:
        assert tokenizer.encode(text) == published.encode(text).ids


# --- damaged folders -----------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def reshape_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (truncate, "model.safetensors is corrupt"),
    "garbled weights": (garble, "model.safetensors is corrupt"),
    "a missing tensor": (drop_a_tensor, "missing: model.layers.1.mlp.up_proj.weight"),
    "a tensor of another shape": (reshape_a_tensor, "mismatched|cannot be loaded"),
    "a missing shard": (lose_a_shard, "model-00001-of-00002.safetensors is missing"),
    "pickled weights": (pickle_only, "pickled weights only"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a garbled configuration": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "an unknown family": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'),
        "config.json cannot be used",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "a garbled tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer .* cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(damage: str, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """A missing or damaged file is named, and nothing is filled in with random numbers."""
    apply, message = DAMAGES[damage]
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    apply(folder)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


# --- the default model ---------------------------------------------------------------------------------------------


def test_the_default_model_is_what_it_should_be(real_model_folder: Path) -> None:
    """Its dimensions, its end token and its special tokens are SmolLM2's."""
    loaded = load_model(str(real_model_folder), dtype="bfloat16")
    spec = loaded.spec
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.hidden_size, spec.vocab_size, spec.context_length) == (576, 49152, 8192)
    assert loaded.eos_token_ids == {2}
    tokenizer = loaded.tokenizer
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_the_default_models_text_round_trips(real_model_folder: Path) -> None:
    """Digits stand alone, spaces and characters of any script come back, and no token is added in front."""
    tokenizer = load_model(str(real_model_folder), dtype="bfloat16").tokenizer
    assert tokenizer.encode("1234") == [33, 34, 35, 36]
    assert tokenizer.encode("  12 34") == [256, 33, 34, 216, 35, 36]
    for text in ["naïve café 日本語 🌲🌳", "a\n\n  b\t\tc 3.14159", " leading , spaces .", "½ ② x²"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_default_models_template_has_its_system_prompt(real_model_folder: Path) -> None:
    """A conversation without a system message starts with SmolLM2's own; these ids are the published tokenizer's."""
    tokenizer = load_model(str(real_model_folder), dtype="bfloat16").tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text)[:11] == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511]


def test_the_default_model_answers(real_model_folder: Path) -> None:
    """An untouched copy under Transformers' own attention and greedy decoding knows the capital of France."""
    model = LlamaForCausalLM.from_pretrained(real_model_folder, dtype=torch.float32)
    tokenizer = load_model(str(real_model_folder), dtype="bfloat16").tokenizer
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    tokens = torch.tensor([tokenizer.encode(prompt)])
    output = model.generate(tokens, max_new_tokens=8, do_sample=False)  # type: ignore[misc]  # its `self` is mistyped
    assert str(tokenizer.decode(output[0])).endswith("The capital of France is Paris.<|im_end|>")


def test_loads_that_overlap_leave_the_number_of_threads_as_it_was() -> None:
    """The first ends while the second is on its way, on another thread."""
    before = torch.get_num_threads()
    first_is_in, first_is_out = threading.Event(), threading.Event()

    def first() -> int:
        with _THREADS.one():
            first_is_in.set()
            assert second_is_in.wait(60)
        first_is_out.set()
        return torch.get_num_threads()

    def second() -> int:
        assert first_is_in.wait(60)
        with _THREADS.one():
            second_is_in.set()
            assert first_is_out.wait(60)
        return torch.get_num_threads()

    second_is_in = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(work) for work in (first, second)]
        assert [task.result() for task in tasks] == [before, before]
    assert torch.get_num_threads() == before
