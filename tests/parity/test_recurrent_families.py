"""Recurrent and hybrid models against those of transformers: the same weights, the same logits, in both directions."""

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import as_language_model, config_from_huggingface
from lightning_lm.models.huggingface.folder import load_huggingface, save_huggingface

TOLERANCE = 2e-5  # float32, logits of order 1
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BODY = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, **NO_TOKENS}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
QWEN3_NEXT = Qwen3NextConfig(
    **BODY,
    **ATTENTION,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
    layer_types=["linear_attention", "full_attention"],
    mlp_only_layers=[0, 1],
    num_experts=0,
)
CONFIGS: dict[str, PreTrainedConfig] = {
    "mamba2": Mamba2Config(**BODY, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "mamba2 with groups and biases": Mamba2Config(
        **BODY, num_heads=8, head_dim=8, state_size=6, n_groups=2, chunk_size=8, use_bias=True, conv_kernel=3
    ),
    "qwen3_next": QWEN3_NEXT,
}
HYBRIDS: dict[str, PreTrainedConfig] = {
    "mamba2": CONFIGS["mamba2"],
    "qwen3_next": QWEN3_NEXT,
    "falcon_h1": FalconH1Config(**BODY, **ATTENTION, **MAMBA, mamba_d_ssm=64, mamba_chunk_size=8),
    "granite": GraniteMoeHybridConfig(
        **BODY,
        **ATTENTION,
        **MAMBA,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=32,
        num_local_experts=0,
    ),
}


def theirs_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with weights of a size that every layer is felt in the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(
                weight + 0.1 * torch.randn_like(weight) if weight.dim() > 1 or "norm" in name else weight + 0.3
            )
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("case", CONFIGS)
def test_logits_both_ways(case: str, tmp_path) -> None:
    theirs = theirs_of(CONFIGS[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_huggingface(tmp_path / "theirs").eval()
    tokens = ids(2, 21)
    wanted = theirs(tokens).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours(tokens), wanted, rtol=0, atol=TOLERANCE)
    cache = ours.make_cache(2, 21)
    parts = [ours(part, cache=cache) for part in tokens.split([9, 1, 11], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=TOLERANCE)
    cache = ours.make_cache(2, 21, starts=torch.tensor([6, 0]))
    padded = ours(tokens, cache=cache)  # theirs is not exact for padded rows where projections have biases
    torch.testing.assert_close(padded[0, 6:], theirs(tokens[:1, 6:]).logits[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(padded[1], wanted[1], rtol=0, atol=TOLERANCE)
    save_huggingface(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    torch.testing.assert_close(again(tokens).logits, wanted, rtol=0, atol=TOLERANCE)


def test_what_is_not_known_is_refused() -> None:
    settings = QWEN3_NEXT.to_dict()
    with pytest.raises(ConfigurationError, match="TransformersModel"):
        config_from_huggingface({**settings, "num_experts": 4, "mlp_only_layers": []})
    with pytest.raises(ConfigurationError, match="time_step_limit"):
        config_from_huggingface({**CONFIGS["mamba2"].to_dict(), "time_step_limit": (0.0, 0.1)})


@torch.no_grad()
@pytest.mark.parametrize("case", HYBRIDS)
def test_packed_rows_are_refused_by_their_recurrent_layers(case: str) -> None:
    model = as_language_model(AutoModelForCausalLM.from_config(HYBRIDS[case]).eval())
    documents = torch.arange(2).repeat_interleave(6)[None]
    with pytest.raises(ConfigurationError, match="OnePerRow"):
        model(ids(1, 12), document_ids=documents)
    assert model(ids(1, 12), document_ids=documents * 0).isfinite().all()
