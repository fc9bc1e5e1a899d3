"""Adapters in the files of peft, both ways; the oracle is peft on the model of transformers, by its logits."""

import json

import peft
import pytest
import torch
import transformers

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models import (
    Adapters,
    PretrainedAdapters,
    PretrainedCheckpoint,
    TransformersModel,
    export_model,
    remove_adapters,
    save_adapters,
)
from lightning_lm.models.huggingface.folder import load_pretrained

FAMILIES = ("llama", "gpt2", "granite")
IDS = torch.randint(31, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base(tmp_path):
    def publish(family):
        torch.manual_seed(0)
        sizes = {"vocab_size": 31, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
        if family == "gpt2":
            sizes = {"vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
        else:
            sizes |= {"num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 16}
        config = transformers.AutoConfig.for_model(family, **sizes, tie_word_embeddings=family != "llama")
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return publish


def disturbed(model):
    """Stands for training: an adapter begins as nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model.eval()


def logits(model):
    with torch.no_grad():
        found = model.eval()(IDS)
    return getattr(found, "logits", found)


def trained(model):
    return {name: value.shape for name, value in model.named_parameters() if value.requires_grad}


def theirs(base, folder):
    return logits(peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


OURS = {
    "matrices": ({}, {}),
    "stable": ({"targets": ("q", "down"), "rank_stabilized": True}, {"targets": ("c_attn", "q_proj")}),
    "queries and head": ({"targets": ("q", "head"), "alpha": 3.0}, {"targets": ("q_proj", "lm_head"), "alpha": 3.0}),
    "embedding": ({"targets": ("embed", "k")}, {"targets": ("embed_tokens", "k_proj")}),
    "whole": ({"targets": ("v",), "trained": ("head", "norm")}, {"targets": ("v_proj",), "trained": ("lm_head",)}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OURS)
def test_peft_opens_what_is_written_here_and_so_do_we(tmp_path, base, family, kind):
    folder = base(family)
    model = load_pretrained(folder)
    ours, named = OURS[kind]
    options = named if isinstance(model, TransformersModel) else ours
    if family == "gpt2":
        options = {**options, "targets": tuple("up" if name == "down" else name for name in options.get("targets", ()))}
    if kind == "stable" and isinstance(model, TransformersModel):
        options = {"targets": ("q_proj", "down_proj"), "rank_stabilized": True}
    Adapters(rank=3, **options).attach(model)
    expected = logits(disturbed(model))
    save_adapters(model, tmp_path / "adapters", base=folder)
    export_model(remove_adapters(model), tmp_path / "base")
    close(theirs(tmp_path / "base", tmp_path / "adapters"), expected)
    close(logits(load_pretrained(tmp_path / "adapters")), expected)
    again = load_pretrained(tmp_path / "base")
    PretrainedAdapters(folder=str(tmp_path / "adapters")).attach(again)
    close(logits(again), expected)
    assert trained(again) == trained(model)


THEIRS = {
    "list": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 5, "lora_dropout": 0.1},
    "all": {"target_modules": "all-linear", "use_rslora": True},
    "regex": {"target_modules": r".*\.layers\.1\..*(gate|v)_proj", "r": 4},
    "patterns": {
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"q_proj": 5, "layers.1.self_attn.o_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7},
    },
    "whole": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}
GPT2 = {
    "fused": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "regex": {"target_modules": r".*h\.0\.(mlp|attn)\.c_.*", "fan_in_fan_out": True, "use_rslora": True},
    "fused whole": {"target_modules": ["c_fc"], "modules_to_save": ["attn.c_attn"], "fan_in_fan_out": True},
}
CASES = (
    [("llama", kind) for kind in THEIRS] + [("granite", kind) for kind in THEIRS] + [("gpt2", kind) for kind in GPT2]
)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_peft_has_written_is_read(tmp_path, base, family, kind):
    folder = base(family)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 3, **(GPT2 if family == "gpt2" else THEIRS)[kind]})
    model = disturbed(peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), settings))
    model.save_pretrained(tmp_path / "adapters")
    expected = logits(model)
    close(logits(load_pretrained(tmp_path / "adapters")), expected)
    mine = load_pretrained(folder)
    assert not torch.allclose(logits(mine), expected, atol=1e-3)
    PretrainedAdapters(folder=str(tmp_path / "adapters")).attach(mine)
    close(logits(mine), expected)
    save_adapters(mine, tmp_path / "again")
    close(theirs(folder, tmp_path / "again"), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora=True"),
        (peft.LoraConfig(target_modules=["q_proj"], bias="all"), "bias='all'"),
        (peft.LoraConfig(target_modules=["q_proj"], lora_bias=True), "lora_bias=True"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]), r"trainable_token_indices=\[3\]"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type='IA3'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds_are_refused_by_name(tmp_path, base, settings, words):
    folder = base("llama")
    settings.task_type = "CAUSAL_LM"
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), settings).save_pretrained(
        tmp_path / "adapters"
    )
    with pytest.raises(ConfigurationError, match=words):
        PretrainedCheckpoint(checkpoint=str(tmp_path / "adapters")).build()


def test_adapters_of_another_model_or_without_a_base_are_refused(tmp_path, base):
    model = load_pretrained(base("llama"))
    with pytest.raises(ConfigurationError, match="has no adapters"):
        save_adapters(model, tmp_path / "adapters")
    Adapters(rank=2).attach(model)
    save_adapters(model, tmp_path / "adapters", base="somebody/small")
    with pytest.raises(CheckpointError, match="hf download somebody/small --local-dir FOLDER"):
        load_pretrained(tmp_path / "adapters")
    with pytest.raises(CheckpointError, match=r"there is no model\.layers\.0\.\S+_proj\.weight here"):
        load_pretrained(tmp_path / "adapters", base=base("gpt2"))
    load_pretrained(tmp_path / "adapters", base=base("llama"))
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["r"] == 2
    (tmp_path / "adapters" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        load_pretrained(tmp_path / "adapters", base=base("llama"))
