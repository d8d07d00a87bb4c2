"""What a model's configuration says about whether this engine can run it exactly.

A model that needs more than full causal attention would run without an error and answer wrongly: tiny differences at
first, nonsense past a window or an original context length. So a configuration is taken only if all of it is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from dendrite.engine.errors import ModelError

EXACT_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rope whose angles depend on the position only, not on how long the longest text of the batch is."""

FULL_ATTENTION = "full_attention"

FAMILY_REASONS = {
    "bloom": "it adds ALiBi to the scores in eager code of its own",
    "falcon": "it computes attention in eager code of its own, some sizes with ALiBi",
    "gptj": "it computes attention in eager code of its own",
    "stablelm": "it drops the keywords that carry the plan before they reach attention",
    "mpt": "it adds ALiBi to the scores in eager code of its own",
    "gpt_neo": "every other layer attends locally, in eager code of its own",
    "gpt_oss": "its attention has sinks, learned scores that take part in the softmax",
}
"""Why, in words, for families that the flags below refuse as well."""


def check_structure(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Refuse a configuration that this engine would run wrongly.

    Returns:
        The class that Transformers builds for it.

    Raises:
        ModelError: names the family and every reason.
    """
    model_class: object = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if config.is_encoder_decoder or not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ModelError(f"{config.model_type} is not a decoder-only language model, and only those are supported")
    reasons = [*_family(config, model_class), *_layers(config), *_positions(config), *_extras(config)]
    if reasons:
        raise ModelError(f"{config.model_type} models like this one would not run exactly: {'; '.join(reasons)}")
    return model_class


def check_modules(model: PreTrainedModel) -> None:
    """Refuse what only the built layers show.

    Raises:
        ModelError: names the first layer that is not plain causal attention, and why.
    """
    family = model.config.model_type
    for name, module in model.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise ModelError(f"{family} models like this one would not run exactly: {name} attends in both directions")
    for name, _ in model.named_parameters():
        if name.endswith(".sinks"):
            raise ModelError(f"{family} models like this one would not run exactly: {name} are attention sinks")


def context_length(config: PreTrainedConfig) -> int:
    """The most tokens that the model was made for.

    Raises:
        ModelError: the configuration does not say.
    """
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise ModelError(f"{config.model_type}: the configuration names no context length (max_position_embeddings)")
    return length


def _family(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Iterator[str]:
    if config.get_text_config() is not config:
        yield "it takes more than text"
    if reason := FAMILY_REASONS.get(config.model_type):
        yield reason
    elif getattr(model_class, "_is_stateful", False):
        yield "it keeps a recurrent state (state-space or hybrid layers), which is no K/V cache"
    elif not model_class.is_backend_compatible():
        yield "its attention does not go through Transformers' attention interface"


def _layers(config: PreTrainedConfig) -> Iterator[str]:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {FULL_ATTENTION})
    if others:
        yield f"some layers are {', '.join(others)}, and only {FULL_ATTENTION} is supported"
    elif has_window(config) and config.sliding_window < context_length(config):
        yield f"attention sees a sliding window of {config.sliding_window} tokens only"
    if getattr(config, "attention_chunk_size", None) is not None:
        yield f"attention sees chunks of {config.attention_chunk_size} tokens only"
    if getattr(config, "num_kv_shared_layers", None):
        yield "some layers read the K/V of others"
    if getattr(config, "kv_lora_rank", None) is not None:
        yield "its attention is latent, with keys and values of different width"


def has_window(config: PreTrainedConfig) -> bool:
    """Whether the configuration sets a sliding window, of whatever size, and does not switch it off."""
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _positions(config: PreTrainedConfig) -> Iterator[str]:
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind not in EXACT_ROPE_TYPES:
            yield f"rope of type {kind} is not supported, only {', '.join(sorted(EXACT_ROPE_TYPES))}"
        if rope.get("mrope_section") is not None:
            yield "its positions have several dimensions (mrope)"
    if getattr(config, "alibi", False):
        yield "it adds ALiBi to the scores"


def _ropes(config: PreTrainedConfig) -> list[Mapping[str, object]]:
    """The rope parameters: none, one set, or one set for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or ([parameters] if parameters else [])


def _extras(config: PreTrainedConfig) -> Iterator[str]:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield "attention scores are capped (attn_logit_softcapping)"
    if getattr(config, "use_bidirectional_attention", False):
        yield "attention is bidirectional"
    if getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantised, and only plain float weights are supported"
