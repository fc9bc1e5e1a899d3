"""Reading and writing checkpoints: what is refused and why. Parity with transformers is in tests/parity."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models import (
    GLU,
    MLP,
    Attention,
    Layer,
    LayerNorm,
    LearnedPositions,
    Llama3Scaling,
    NTKScaling,
    PretrainedCheckpoint,
    RMSNorm,
    Rope,
    TransformerConfig,
    TransformersModel,
    YaRNScaling,
    config_from_huggingface,
    config_to_huggingface,
    load_huggingface,
    presets,
    save_huggingface,
)
from lightning_lm.parts import Part
from lightning_lm.tokenizers import BPETokenizer, load_tokenizer

LLAMA = TransformerConfig(
    vocab_size=61, d_model=32, num_layers=2, layers=Layer(mixer=Attention(num_heads=4)), context_length=64
)
GPT2 = replace(
    LLAMA,
    layers=Layer(mixer=Attention(num_heads=4, rope=None, bias="all"), ffn=MLP(activation="gelu_tanh", bias=True)),
    norm=LayerNorm(),
    positions=LearnedPositions(),
    tie_embeddings=True,
)


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = LLAMA.build()
    save_huggingface(model, tmp_path)
    return model, tmp_path


def mixed(**mixer):
    return replace(LLAMA, layers=Layer(mixer=Attention(num_heads=4, **mixer)))


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (presets.gpt2("774M", dropout=0.1), "gpt2"),
        (presets.llama2("70B"), "llama"),
        (presets.llama3("1B"), "llama"),
        (presets.mistral(), "mistral"),
        (presets.mistral(window=None), "llama"),
        (presets.qwen2("7B"), "qwen2"),
        (presets.qwen3("4B"), "qwen3"),
        (presets.tinystories(), "llama"),
        (mixed(rope=Rope(scaling=YaRNScaling(attention_factor=1.2, original_context_length=16))), "llama"),
        (mixed(bias="all", dropout=0.1), "llama"),
        (mixed(qk_norm="head", bias="all"), "qwen3"),
        (replace(LLAMA, layers=(Layer(mixer=Attention(num_heads=4, bias="qkv")),) * 2), "qwen2"),
    ],
)
def test_each_config_finds_its_family_and_comes_back(config, family):
    settings = config_to_huggingface(config)
    assert settings["model_type"] == family
    again = config_from_huggingface(json.loads(json.dumps(settings)))
    assert config_to_huggingface(again) == settings
    with torch.device("meta"):
        shapes = [{name: value.shape for name, value in c.build().state_dict().items()} for c in (config, again)]
    assert shapes[0] == shapes[1]


def test_what_decides_the_function_survives_the_way_there_and_back():
    config = mixed(num_kv_heads=2, rope=Rope(base=5e5, scaling=Llama3Scaling(factor=4.0, original_context_length=16)))
    again = config_from_huggingface(config_to_huggingface(config))
    assert again.layers.mixer == replace(config.layers.mixer, head_dim=8)
    assert again.layers.ffn == GLU(hidden_size=128)  # 8/3 * 32, rounded up to a multiple of 64
    assert (again.norm, again.context_length, again.tie_embeddings) == (RMSNorm(), 64, False)


def test_alternating_windows_are_read_as_the_shortest_cycle():
    windows = tuple(Layer(mixer=Attention(num_heads=4, qk_norm="head", window=window)) for window in (5, None))
    config = replace(LLAMA, num_layers=6, layers=windows)
    again = config_from_huggingface(config_to_huggingface(config))
    assert [layer.mixer.window for layer in again.layers] == [5, None]


@torch.no_grad()
def test_ntk_scaling_is_written_as_the_base_it_is(tmp_path, ids):
    model = mixed(rope=Rope(scaling=NTKScaling(factor=4.0))).build().eval()
    save_huggingface(model, tmp_path)
    again = load_huggingface(tmp_path).eval()
    assert again.config.layers.mixer.rope.scaling is None
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (replace(LLAMA, embed_scale=2.0), r"llama: it has no embed_scale=2\.0"),
        (replace(LLAMA, residual="sandwich"), "llama: it has no residual=sandwich"),
        (replace(LLAMA, logit_softcap=30.0), "logit_softcap"),
        (mixed(softcap=50.0), r"layers\.0\.mixer\.softcap=50\.0"),
        (mixed(qk_norm="full"), "qwen3: it has no layers.0.mixer.qk_norm=full"),
        (mixed(rope=None), "llama: there are no rotary positions"),
        (mixed(rope=Rope(interleaved=True)), "interleaved=True"),
        (mixed(rope=Rope(fraction=0.5, interleaved=True)), r"fraction=0\.5"),
        (replace(LLAMA, layers=Layer(mixer=Attention(num_heads=4), ffn=MLP())), "ffn is a MLP, not a GLU"),
        (replace(LLAMA, layers=Layer(mixer=Attention(num_heads=4), ffn=None)), "ffn is a NoneType"),
        (replace(LLAMA, norm=LayerNorm()), "norm is a LayerNorm"),
        (replace(GPT2, norm=LayerNorm(bias=False)), r"gpt2: it has no norm\.bias=False"),
        (replace(GPT2, positions=None), "gpt2: it has no positions=None"),
    ],
)
def test_what_no_family_can_say_is_refused_with_the_reason(config, reason):
    with pytest.raises(ConfigurationError, match=reason):
        config_to_huggingface(config)


def test_a_family_can_be_asked_for():
    assert config_to_huggingface(LLAMA, family="mistral")["sliding_window"] is None
    with pytest.raises(ConfigurationError, match="qwen3: it has no layers"):
        config_to_huggingface(LLAMA, family="qwen3")
    with pytest.raises(ConfigurationError, match="known are llama"):
        config_to_huggingface(LLAMA, family="rwkv")
    with pytest.raises(ConfigurationError, match=r"model\.config"):
        config_to_huggingface(replace(LLAMA, vocab_size=None))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "qwen4_moe"}, ConfigurationError, "'qwen4_moe' is not known.*qwen3_moe.*TransformersModel"),
        ({"hidden_size": None}, CheckpointError, "lacks hidden_size"),
        ({"hidden_act": "mish"}, ConfigurationError, "'mish' is not known"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ConfigurationError, "known kinds are default, lin"),
        ({"rope_scaling": {"full_attention": {"rope_type": "linear"}}}, ConfigurationError, "same in every layer"),
        ({"partial_rotary_factor": 0.5}, ConfigurationError, "partial_rotary_factor=0.5"),
    ],
)
def test_a_config_json_that_is_not_understood_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        config_from_huggingface(config_to_huggingface(LLAMA) | change)
    with pytest.raises(ConfigurationError, match="scale_attn_by_inverse_layer_idx=True"):
        config_from_huggingface(config_to_huggingface(GPT2) | {"scale_attn_by_inverse_layer_idx": True})


def test_a_folder_holds_what_others_look_for(tmp_path):
    folder = tmp_path / "out"
    tokenizer = BPETokenizer.train(["a text, a longer text"] * 3, 262, num_workers=1, show_progress=False)
    with pytest.raises(ConfigurationError, match="262 ids and the model 61"):
        save_huggingface(LLAMA.build(), folder, tokenizer)
    model = replace(LLAMA, vocab_size=264).build()
    save_huggingface(model, folder)
    names = {"model.safetensors", "config.json", "generation_config.json", "SHA256SUMS"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "generation_config.json").read_text()) == {}
    save_huggingface(model, folder, tokenizer, dtype=torch.bfloat16)
    settings = json.loads((folder / "config.json").read_text())
    eos_id = tokenizer.eos_id
    assert (settings["eos_token_id"], settings["bos_token_id"], settings["dtype"]) == (eos_id, None, "bfloat16")
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": eos_id}
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs("a text")["input_ids"], theirs.eos_token_id) == (tokenizer.encode("a text"), eos_id)
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights["model.layers.1.mlp.gate_proj.weight"].shape == (128, 32)


@pytest.mark.parametrize("config", [LLAMA, GPT2])
@torch.no_grad()
def test_precision_is_chosen_on_loading(config, tmp_path, ids):
    model = config.build().to(torch.bfloat16).eval()
    save_huggingface(model, tmp_path)
    same = load_huggingface(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(same(ids), model(ids))
    assert (same.head.weight is same.embed.weight) == config.tie_embeddings
    wide = load_huggingface(tmp_path)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert wide.training


def test_weights_saved_from_the_bare_body_and_tables_of_old_releases_are_understood(tmp_path):
    model = GPT2.build()
    save_huggingface(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in weights.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "SHA256SUMS").unlink()
    again = load_huggingface(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_weights_that_do_not_fit_are_named(saved):
    _, folder = saved
    (folder / "SHA256SUMS").unlink()
    weights = load_file(folder / "model.safetensors")
    less = dict(weights)
    del less["model.layers.0.self_attn.q_proj.weight"]
    less["extra.weight"] = torch.ones(1)
    save_file(less, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.0.*q_proj\.weight, not expected extra\.weight"):
        load_huggingface(folder)
    save_file(weights | {"lm_head.weight": torch.ones(62, 32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*\(62, 32\).*asks for \(61, 32\)"):
        load_huggingface(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .*layers\.2.* and 6 more, not expected nothing"):
        load_huggingface(folder)


def test_a_pickle_is_refused(saved):
    _, folder = saved
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        load_huggingface(folder)


def test_only_a_transformer_is_written(tmp_path):
    with pytest.raises(ConfigurationError, match="not a Linear"):
        save_huggingface(torch.nn.Linear(2, 2), tmp_path)


@torch.no_grad()
def test_a_checkpoint_is_a_model_that_can_be_named_in_yaml(saved, ids):
    model, folder = saved
    part = PretrainedCheckpoint(checkpoint=str(folder), context_length=32)
    assert Part.from_dict(part.to_dict()) == part
    built = part.build(vocab_size=60)
    assert torch.equal(built.eval()(ids), model.eval()(ids))
    assert built.config == replace(load_huggingface(folder).config, context_length=32)
    assert PretrainedCheckpoint(checkpoint=str(folder)).build().config.context_length == 64
    with pytest.raises(ConfigurationError, match=r"62 ids and .* has 61; use the checkpoint's"):
        part.build(vocab_size=62)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        PretrainedCheckpoint(checkpoint=str(folder / "nowhere")).build()


def test_the_adapter_is_exported():
    with pytest.raises(ConfigurationError):
        TransformersModel(LLAMA.build())
