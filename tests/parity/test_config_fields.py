"""Every field of every configuration class of transformers is read, refused by name, or known to change no logit."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    Mamba2Config,
    ModernBertConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    T5Config,
)

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models.huggingface.config_json import config_from_huggingface
from lightning_lm.models.huggingface.families import FAMILIES
from tests.parity.test_transformers import CONFIGS, NO_TOKENS, SIZES

BODY = {**SIZES, "num_hidden_layers": 4}
ENCODER = {key: value for key, value in BODY.items() if key != "num_key_value_heads"}
BASES: dict[str, PreTrainedConfig] = {
    **{config.model_type: config for config in CONFIGS.values()},
    "mamba2": Mamba2Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, **NO_TOKENS),
    "qwen3_next": Qwen3NextConfig(**BODY, head_dim=8, num_experts=0, mlp_only_layers=[0, 1, 2, 3]),
    "bert": BertConfig(**ENCODER),
    "modernbert": ModernBertConfig(**{**ENCODER, "pad_token_id": 0}),
    "t5": T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4),
}
ROPES = [
    {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 300.0, "factor": 2.0, "original_max_position_embeddings": 32},
]
NEUTRAL = {
    *("return_dict", "output_hidden_states", "output_attentions", "use_cache", "dtype", "chunk_size_feed_forward"),
    *("architectures", "id2label", "label2id", "problem_type", "transformers_version", "model_type", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id"),
    *("is_encoder_decoder", "pretraining_tp", "classifier_dropout", "output_router_logits"),
}
"""Fields of every class that decide no logit."""

WITHOUT_LOSS = {"router_aux_loss_coef"}  # read where output_router_logits asks for the loss
OF_FAMILY = {
    "qwen2": {"max_window_layers"},  # layer_types says it
    "qwen3": {"max_window_layers"},
    "phi3": {"original_max_position_embeddings"},  # read with a scaling
    "smollm3": {"no_rope_layer_interval", "use_sliding_window"},  # no_rope_layers and layer_types say it
    "gemma3_text": {"_sliding_window_pattern"},
    "mixtral": WITHOUT_LOSS,
    "olmoe": WITHOUT_LOSS,
    "gpt_oss": WITHOUT_LOSS,
    "qwen3_moe": WITHOUT_LOSS | {"decoder_sparse_step", "sliding_window", "use_sliding_window"},
    "deepseek_v3": {"num_key_value_heads", "qk_head_dim", "num_nextn_predict_layers", "topk_group"},
    "gpt2": {"embd_pdrop", "reorder_and_upcast_attn", "summary_type", "summary_proj_to_labels"}
    | {"summary_first_dropout", "summary_activation", "summary_use_proj"},
    "mamba2": {"chunk_size", "residual_in_fp32", "rescale_prenorm_residual", "time_step_rank"}
    | {"time_step_min", "time_step_max", "time_step_floor"},
    "qwen3_next": WITHOUT_LOSS
    | {"num_experts_per_tok", "decoder_sparse_step", "norm_topk_prob", "num_experts"}
    | {"mlp_only_layers", "moe_intermediate_size", "shared_expert_intermediate_size"},
    "bert": {"add_cross_attention"},  # read by decoders, which are refused
    "modernbert": {"sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn", "classifier_pooling"}
    | {"initializer_cutoff_factor"},
    "t5": {"initializer_factor", "is_decoder"},
}
"""Fields of a class that decide no logit of the config above; by the logits of transformers themselves."""


def changed(name: str, value: Any) -> list[Any]:
    """Other values of a field."""
    if name == "rope_parameters":
        return [{kind: ROPES[0] for kind in value}] if any(isinstance(v, dict) for v in value.values()) else ROPES
    if name == "layer_types":
        return [["full_attention"] * len(value), list(value)[::-1], [value[0]] * len(value)]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2 or 2, value + 1, 1]
    if isinstance(value, str):
        return ["relu", "gelu", "gated-silu", "relative_key"]
    if isinstance(value, list | tuple):
        return [[1, 0, 1, 1], [0.5, 1.5]]
    return [3]


def read(settings: dict[str, Any]) -> Any:
    """The config of settings, or None where they are refused."""
    try:
        return config_from_huggingface(settings)
    except (ConfigurationError, CheckpointError):
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_read_or_refused(family):
    settings, passed_over = BASES[family].to_dict(), set()
    plain = config_from_huggingface(settings)
    for name, value in settings.items():
        if name not in NEUTRAL and all(read({**settings, name: other}) == plain for other in changed(name, value)):
            passed_over.add(name)
    assert passed_over <= OF_FAMILY.get(family, set())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_is_left_out_has_the_default_of_transformers(family):
    settings, required = BASES[family].to_dict(), FAMILIES[family].required
    for name in settings.keys() - NEUTRAL - {*required}:
        fewer = {key: copy.deepcopy(value) for key, value in settings.items() if key != name}
        filled = type(BASES[family]).from_dict(copy.deepcopy(fewer)).to_dict()
        assert read(fewer) == read(filled), name


REFUSED = {
    "flat settings of OLMo 3": ("olmo3", {"rope_parameters": ROPES[1]}, "each kind of layers"),
    "another base of OLMo 3": ("olmo3", {"rope_parameters": None, "rope_theta": 300.0}, "Give both kinds"),
    "sparse layers in between": ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    "another score": ("deepseek_v3", {"scoring_func": "softmax"}, "only 'sigmoid' is"),
    "another choice": ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
    "heads of another size": ("deepseek_v3", {"head_dim": 2}, "only 8 is"),
    "noise of the router": ("mixtral", {"router_jitter_noise": 0.1}, "set it to 0"),
    "activation of convolutions": ("qwen3_next", {"hidden_act": "gelu"}, "silu"),
    "a window beside another": ("modernbert", {"sliding_window": 5}, "local_attention"),
    "half a T5": ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder=False"),
    "activations that contradict": ("t5", {"dense_act_fn": "gelu"}, "dense_act_fn='gelu'"),
    "a gate that contradicts": ("t5", {"is_gated_act": True}, "is_gated_act=True"),
    "two biases": ("bert", {"tie_word_embeddings": False}, "two biases"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_function_is_refused_by_name(case):
    family, given, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        config_from_huggingface({**BASES[family].to_dict(), **given})


def test_the_outer_original_length_goes_before_the_inner_one():
    rope = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 2.0, "original_max_position_embeddings": 32}
    settings = {"model_type": "llama", **SIZES, "rope_parameters": rope, "original_max_position_embeddings": 16}
    theirs = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(copy.deepcopy(settings)))
    scaling = config_from_huggingface(settings).layers.mixer.rope.scaling
    torch.testing.assert_close(
        scaling.frequencies(16, 300.0).float(), theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0
    )
