"""Our models against those of transformers: the same weights must give the same logits, in both directions."""

import copy
import logging
import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from lightning_lm.errors import ConfigurationError, LightningLMError
from lightning_lm.models.huggingface.config_json import config_from_huggingface, config_to_huggingface
from lightning_lm.models.huggingface.folder import load_huggingface, save_huggingface

TOLERANCE = 1e-5  # float32, two layers, logits of order 1: the order of sums differs, nothing else
SEQUENCE = 48

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **NO_TOKENS,
}
LATENT = {
    "kv_lora_rank": 20, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **NO_TOKENS}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**GPT2_SIZES),
    "gpt2 with exact GELU, wide, untied, unscaled": GPT2Config(
        **GPT2_SIZES, activation_function="gelu", n_inner=72, tie_word_embeddings=False, scale_attn_weights=False
    ),
    "llama": LlamaConfig(**SIZES),
    "llama tied, with biases, heads of another size, GEGLU": LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=24, hidden_act="gelu"
    ),
    "llama with multi-query attention": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "llama with Llama-3 scaling": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama with YaRN scaling": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama with YaRN scaling, all settings": LlamaConfig(
        **SIZES, rope_parameters={**YARN, "beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.3}
    ),
    "llama with YaRN scaling of DeepSeek's kind": LlamaConfig(
        **SIZES, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
    ),
    "llama with linear scaling": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
    ),
    "mistral with a window shorter than the sequence": MistralConfig(**SIZES, sliding_window=7),
    "mistral without a window": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 with windows in the upper layers": Qwen2Config(
        **{**SIZES, "num_hidden_layers": 3}, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "gemma3": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3, "max_position_embeddings": 64},
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        },
    ),
    "gemma3 with a soft cap": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=7, final_logit_softcapping=3.0),
    "olmo2": Olmo2Config(**SIZES),
    "olmo3 with YaRN in the layers without a window": Olmo3Config(
        **{**SIZES, "num_hidden_layers": 4},
        sliding_window=7,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {**YARN, "rope_theta": 500.0},
        },
    ),
    "smollm3": SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}, no_rope_layers=[1, 1, 1, 0]),
    "smollm3 with windows in other layers than those without positions": SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 3},
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "smollm3 without positions in each second layer": SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 4}, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=7
    ),
    "smollm3 with windows in layers that rotate": SmolLM3Config(
        **SIZES,
        use_sliding_window=True,
        sliding_window=7,
        no_rope_layers=[1, 0],
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": Phi3Config(**SIZES, sliding_window=7),
    "phi3 with half of a head rotated": Phi3Config(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    ),
    "granite": GraniteConfig(
        **SIZES, embedding_multiplier=6.0, residual_multiplier=0.22, attention_multiplier=0.3, logits_scaling=1.7
    ),
    "granite without multipliers, tied, with biases": GraniteConfig(
        **SIZES,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        logits_scaling=3.0,
        embedding_multiplier=2.0,
    ),
    "glm4": Glm4Config(**SIZES, head_dim=16),
    "deepseek_v3": DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}, **LATENT),
    "deepseek_v3 without groups, with YaRN": DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        **{**LATENT, "n_group": 1, "topk_group": 1, "q_lora_rank": None},
        attention_bias=True,
        rope_interleave=False,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "gpt_oss": GptOssConfig(
        **{**SIZES, "intermediate_size": 24},
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=7,
        swiglu_limit=1.5,
        rope_parameters={**YARN, "truncate": False},
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "qwen3 with alternating windows": Qwen3Config(
        **{**SIZES, "num_hidden_layers": 4},
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mixtral with a window": MixtralConfig(**SIZES, num_local_experts=4, sliding_window=7),
    "qwen3_moe, every other layer dense": Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 4}, **EXPERTS, head_dim=24, decoder_sparse_step=2, moe_intermediate_size=24
    ),
    "qwen3_moe with normalised weights, the first layer dense": Qwen3MoeConfig(
        **SIZES, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[0], moe_intermediate_size=24
    ),
    "olmoe": OlmoeConfig(**SIZES, **EXPERTS),
}


def randomised(model):
    """Draw every parameter, gains and biases too, so that none of them is a one or a zero that hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # of routers, which training moves
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(0, 97, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "_"))
def theirs(request):
    return randomised(AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation="eager"))


@torch.no_grad()
def test_a_saved_model_of_transformers_gives_the_same_logits_here(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = load_huggingface(tmp_path).eval()
    expected = theirs(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_an_export_opens_in_transformers_without_a_word_and_gives_the_same_logits(theirs, ids, tmp_path, caplog):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_huggingface(tmp_path / "theirs").eval()
    save_huggingface(ours, tmp_path / "ours")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="transformers"):
            warnings.simplefilter("error")
            again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == []
    assert not any(report.values()), report
    torch.testing.assert_close(again.eval()(ids).logits, theirs(ids).logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_the_export_is_read_back_bit_for_bit(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_huggingface(tmp_path / "theirs")
    save_huggingface(ours, tmp_path / "ours", max_shard_bytes=50_000)
    again = load_huggingface(tmp_path / "ours")
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in ours.state_dict().items())
    assert torch.equal(again.eval()(ids), ours.eval()(ids))
    assert config_to_huggingface(again.config) == config_to_huggingface(ours.config)


def test_both_spellings_of_the_rotary_settings_mean_the_same():
    old = {"model_type": "llama", **SIZES, "rope_theta": 10_000.0, "rope_scaling": dict(LLAMA3)}
    del old["rope_scaling"]["rope_theta"]
    new = {"model_type": "llama", **SIZES, "rope_parameters": LLAMA3}
    older = {**old, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert config_from_huggingface(old) == config_from_huggingface(new)
    assert config_from_huggingface(older).layers.mixer.rope.scaling.factor == 2.0


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_json_leaves_out_is_what_transformers_assumes(name):
    config = CONFIGS[name]
    assert config_from_huggingface(config.to_diff_dict()) == config_from_huggingface(config.to_dict())


# Every field is changed alone. Where our reading is then the same as before, so must be the logits of transformers.

NOT_COMPUTED = {
    *("architectures", "model_type", "transformers_version", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "vocab_size"),
    *("is_encoder_decoder", "problem_type", "id2label", "label2id", "num_labels", "initializer_range"),
    *("output_router_logits", "router_aux_loss_coef"),
}
"""Fields of training, of files and of interfaces."""
REFUSED = (
    LightningLMError,
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
"""Ways in which we and transformers say that a value cannot be."""
FAMILIES = {config.model_type: config for config in CONFIGS.values()}


def changed(value):
    """Return other values of a field's kind."""
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [value * 2, value / 2 if isinstance(value, float) else max(value // 2, 1)] if value else [1, 2]
        case None:
            return [1, 3, True, 0.5]
        case [str(), *_]:
            return [value[::-1], ["full_attention"] * len(value), ["sliding_attention"] * len(value)]
        case [int(), *_]:
            return [value[::-1], [1 - entry for entry in value]]
        case {"rope_type": _}:
            return [{**value, "rope_theta": 77.0}, {**value, "partial_rotary_factor": 0.25}]
        case _:
            return []


def logits_of(config, ids):
    model = randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    return model(ids).logits


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_are_passed_over_change_nothing_in_transformers(family):
    config = FAMILIES[family]
    ids = torch.randint(0, 97, (1, 24), generator=torch.Generator().manual_seed(1))
    given, num_read = config.to_dict(), 0
    before, expected = config_from_huggingface(given), logits_of(config, ids)
    for name, value in given.items():
        for other in changed(value) if name not in NOT_COMPUTED else ():
            fields = {**copy.deepcopy(given), name: other}
            try:
                same = config_from_huggingface(fields) == before
            except REFUSED:
                continue
            num_read += not same
            if not same:
                continue
            fields.pop("model_type")
            try:
                theirs = type(config)(**fields)
                found = logits_of(theirs, ids)
            except REFUSED:
                continue
            assert torch.equal(found, expected), (name, other)
    assert num_read > 10


def test_settings_that_a_file_leaves_out_or_spells_in_the_old_way():
    sizes = {name: value for name, value in SIZES.items() if name not in NO_TOKENS}
    mixtral = config_from_huggingface(
        {"model_type": "mixtral", **sizes, "num_local_experts": 4, "num_experts_per_tok": 2}
    )
    assert mixtral.layers.mixer.rope.base == 1_000_000.0
    gpt_oss = {"model_type": "gpt_oss", **sizes, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    scaling = config_from_huggingface(gpt_oss).depth_pattern[0].mixer.rope.scaling
    assert (scaling.factor, scaling.original_context_length, scaling.truncate) == (32.0, 4096, False)
    yarn = {"model_type": "llama", **sizes, "rope_scaling": dict(YARN), "original_max_position_embeddings": 32}
    assert config_from_huggingface(yarn).layers.mixer.rope.scaling.original_context_length == 32
    for family in ("olmo3", "gemma3_text"):
        with pytest.raises(ConfigurationError, match="one object for each kind of layers"):
            config_from_huggingface({"model_type": family, **sizes, "head_dim": 16, "rope_parameters": YARN})
