"""GGUF files: written by us and read by transformers' own reader; read by us and compared with their model."""

import json
import random
import sys

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader, GGUFWriter

from lightning_lm.errors import CheckpointError, ConfigurationError, MissingDependencyError, TokenizerError
from lightning_lm.models import (
    Attention,
    Layer,
    LinearScaling,
    Llama3Scaling,
    Rope,
    TransformerConfig,
    YaRNScaling,
    export_gguf,
    import_gguf,
    load_huggingface,
    save_huggingface,
)
from lightning_lm.models.gguf.vocabulary import tokenizer_files, vocabulary_metadata
from lightning_lm.models.huggingface.folder import load_pretrained
from lightning_lm.tokenizers import BPETokenizer, SentencePieceTokenizer, load_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama_tied_and_biased": transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=32),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=128),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=256, query_pre_attn_scalar=256, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=256, query_pre_attn_scalar=256, sliding_window=8),
}
BIASED_ONLY_HERE = ("llama_tied_and_biased",)
"""Models with biases that transformers' reader of GGUF has no names for."""
TEXTS = ["def main(x):\n    return x + 12345", "The capital of France is Paris.", "Café déjà vu 中文 🙂\t\n  x"]


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["def main(x):\n    return x + 1\n" * 20, *TEXTS], vocab_size=300, show_progress=False)


def edited(path, **changes):
    """Change a JSON file as a user would who means it: its digest goes too."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    path.with_name("SHA256SUMS").unlink(missing_ok=True)


def random_model(config, tokenizer):
    """Return a model whose parameters are all random, so that a norm weight in the wrong place is seen."""
    torch.manual_seed(0)
    config.vocab_size = tokenizer.vocab_size + 4  # more rows than ids, as published models have
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def written(request, tokenizer, tmp_path_factory):
    """Return a name, a model, its folder and the same as a GGUF file of float32."""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(CONFIGS[request.param], tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    export_gguf(folder / "model", folder / "model.gguf", quantization="f32")
    return request.param, model, folder


def ids_of(model):
    return torch.randint(0, model.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids):
    out = model(ids)
    return out.logits if hasattr(out, "logits") else out


def test_transformers_reads_what_was_written(written):
    name, model, folder = written
    if name in BIASED_ONLY_HERE:
        arrays = {tensor.name: tensor.data for tensor in GGUFReader(folder / "model.gguf").tensors}
        bias = model.model.layers[1].mlp.up_proj.bias
        np.testing.assert_array_equal(arrays["blk.1.ffn_up.bias"], bias.detach().numpy())
        return
    read = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = ids_of(model)
    torch.testing.assert_close(logits(read, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_what_was_written_is_read_back(written, tmp_path):
    _, model, folder = written
    settings = import_gguf(folder / "model.gguf", tmp_path)
    ids = ids_of(model)
    torch.testing.assert_close(logits(load_pretrained(tmp_path).eval(), ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for parameter, original in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, original, rtol=1e-6, atol=1e-6)  # Gemma's norms are written plus 1
    assert settings["vocab_size"] == model.config.vocab_size


def test_the_tokenizer_goes_with_it(written, tokenizer, tmp_path):
    import_gguf(written[2] / "model.gguf", tmp_path)
    read = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert read.encode(text) == tokenizer.encode(text)
    assert (read.eos_id, read.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(factor=4.0),
        YaRNScaling(factor=4.0, original_context_length=16),
        Llama3Scaling(factor=8.0, original_context_length=8192),
        Llama3Scaling(factor=32.0, original_context_length=8192),
        Llama3Scaling(factor=4.0, original_context_length=48),
    ],
    ids=str,
)
def test_scaled_positions_survive(scaling, tokenizer, tmp_path):
    layer = Layer(mixer=Attention(num_heads=2, head_dim=64, rope=Rope(base=500_000.0, scaling=scaling)))
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, num_layers=1, layers=layer, context_length=64
    )
    model = config.build().eval()
    save_huggingface(model, tmp_path / "a", tokenizer)
    export_gguf(tmp_path / "a", tmp_path / "a.gguf", quantization="f32")
    import_gguf(tmp_path / "a.gguf", tmp_path / "b")
    read = load_huggingface(tmp_path / "b")
    assert read.config.depth_pattern[0].mixer.rope.scaling == scaling
    ids = torch.arange(60)[None]
    assert torch.equal(logits(read.eval(), ids), logits(model, ids))


@pytest.mark.parametrize(("quantization", "levels"), [("q8_0", 127), ("q5_1", 31 / 2), ("q4_0", 8), ("q4_1", 15 / 2)])
def test_quantized_weights_are_within_half_a_step(quantization, levels, tokenizer, tmp_path):
    model = random_model(CONFIGS["llama"], tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", quantization=quantization)
    import_gguf(tmp_path / "model.gguf", tmp_path / "read")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "read")
    for (name, given), parameter in zip(model.named_parameters(), read.parameters(), strict=True):
        if given.dim() == 1:
            assert torch.equal(given, parameter), name
            continue
        blocks = given.unflatten(-1, (-1, 32))  # permuting whole rows leaves blocks whole
        step = blocks.abs().amax(-1, keepdim=True) / levels
        error = (parameter.unflatten(-1, (-1, 32)) - blocks).abs()
        rounded = levels * 2**-11  # of the step, which is stored as float16
        assert (error <= step * (rounded + (1.0 if quantization == "q4_0" else 0.5))).all(), name  # no level at +8


def test_rows_that_are_no_multiple_of_a_block_are_half_precision(tokenizer, tmp_path):
    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 40, "intermediate_size": 96})
    random_model(config, tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", quantization="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_down.weight"], kinds["output_norm.weight"]) == (
        "F16",
        "Q8_0",
        "F32",
    )


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    lexicon = ["a", "lot", "of", "words", "stand", "in", "this", "text", "about", "something", "else"]
    words = " ".join(random.Random(0).choices(lexicon, k=3000))
    texts = [words[start : start + 200] for start in range(0, len(words), 200)]
    SentencePieceTokenizer.train(texts, vocab_size=330, model_type="bpe").save(folder)
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def sentencepiece_metadata(model):
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6))
    types = [next((number for test, number in kinds if test(index)), 1) for index in range(len(model))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(len(model))],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(len(model))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": model.encode("a")[0] == model.piece_to_id("▁a"),
    }


@pytest.mark.parametrize("again", [False, True])
def test_pieces_are_those_of_sentencepiece(sentencepiece, tmp_path, again):
    """With ``again``, the scores have been written from the merges and read once more."""
    metadata = sentencepiece_metadata(sentencepiece)
    for name, content in tokenizer_files(metadata, "file").items():
        (tmp_path / name).write_text(content)
    if again:
        metadata = vocabulary_metadata(tmp_path, len(sentencepiece))
        for name, content in tokenizer_files(metadata, "file").items():
            (tmp_path / name).write_text(content)
    read = load_tokenizer(tmp_path)
    rng = random.Random(1)
    alphabet = "a lot of words stand in this text about something else é中🙂"
    for text in [*TEXTS[1:], *("".join(rng.choices(alphabet, k=30)).strip() for _ in range(50))]:
        assert read.encode(" ".join(text.split())) == sentencepiece.encode(" ".join(text.split())), text


def test_a_file_cut_anywhere_is_refused(written, tmp_path):
    whole = (written[2] / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 10, 30, 200, len(whole) // 100, len(whole) // 2, len(whole) - 64):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            import_gguf(cut, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_other_versions_and_files_are_refused(written, tmp_path):
    whole = bytearray((written[2] / "model.gguf").read_bytes())
    whole[4:8] = (99).to_bytes(4, "little")
    (tmp_path / "new.gguf").write_bytes(whole)
    with pytest.raises(CheckpointError, match="version"):
        import_gguf(tmp_path / "new.gguf", tmp_path / "folder")
    (tmp_path / "text.gguf").write_text("GGML is another format")
    with pytest.raises(CheckpointError, match=r"no GGUF file: it begins with b'GGML'"):
        import_gguf(tmp_path / "text.gguf", tmp_path / "folder")


def write_metadata(path, architecture, **values):
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_unknown_architecture_or_setting_is_named(tmp_path):
    write_metadata(tmp_path / "a.gguf", "mamba")
    with pytest.raises(ConfigurationError, match=r"architecture 'mamba'; read are llama, qwen2"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "folder")
    write_metadata(tmp_path / "b.gguf", "llama", block_count=1)
    with pytest.raises(CheckpointError, match=r"lacks llama\.embedding_length"):
        import_gguf(tmp_path / "b.gguf", tmp_path / "folder")


def test_the_missing_package_is_named(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install \"lightning-lm\[gguf\]\""):
        import_gguf(written[2] / "model.gguf", tmp_path)


def test_an_unknown_rule_for_words_names_the_remedy(tokenizer):
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.pre": "tomorrow"}
    with pytest.raises(TokenizerError, match=r"rule 'tomorrow'; known are .*--tokenizer FOLDER"):
        tokenizer_files(metadata, "file")
    with pytest.raises(TokenizerError, match="no vocabulary"):
        tokenizer_files({}, "file")


def test_models_that_llama_cpp_computes_otherwise_are_refused(tokenizer, tmp_path):
    config = transformers.MistralConfig(**SIZES, sliding_window=16)
    random_model(config, tokenizer).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(ConfigurationError, match="sliding_window=16 is shorter than the context of 64"):
        export_gguf(tmp_path, tmp_path / "model.gguf")
    edited(tmp_path / "config.json", sliding_window=None, hidden_act="gelu")
    with pytest.raises(ConfigurationError, match=r"hidden_act='gelu' cannot be written .* computes 'silu'"):
        export_gguf(tmp_path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_tokenizer_without_a_form_is_refused(tokenizer, tmp_path):
    random_model(CONFIGS["llama"], tokenizer).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        export_gguf(tmp_path, tmp_path / "model.gguf")
    tokenizer.save(tmp_path)
    edited(tmp_path / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(TokenizerError, match=r"has no name .*Whitespace.*--splitting NAME"):
        export_gguf(tmp_path, tmp_path / "model.gguf")


def test_the_template_and_the_ends_go_both_ways(tokenizer, tmp_path):
    random_model(CONFIGS["llama"], tokenizer).save_pretrained(tmp_path / "a")
    tokenizer.save(tmp_path / "a")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    edited(tmp_path / "a" / "tokenizer_config.json", chat_template=template)
    edited(tmp_path / "a" / "generation_config.json", eos_token_id=[tokenizer.eos_id, 7])
    export_gguf(tmp_path / "a", tmp_path / "a.gguf")
    import_gguf(tmp_path / "a.gguf", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"] == template
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == [tokenizer.eos_id, 7]
