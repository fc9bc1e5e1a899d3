import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma4Config,
    Gemma4TextConfig,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    RecurrentGemmaConfig,
    T5Config,
)

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.attention import causal_attention
from lightning_lm.generation import Generator, Sampling, Speculation
from lightning_lm.models.huggingface.transformers_model import TransformersModel, as_language_model
from lightning_lm.models.own_model import whole_logits
from lightning_lm.models.summary import attention_shapes
from lightning_lm.modules.activation_checkpointing import recompute_blocks
from lightning_lm.protocols import LanguageModel

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
GEMMA4 = Gemma4TextConfig(
    vocab_size=61,
    num_key_value_heads=2,
    global_head_dim=16,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=61,
    layer_types=["sliding_attention", "full_attention"],
    final_logit_softcapping=2.0,
    num_kv_shared_layers=0,
    **NO_TOKENS | {"pad_token_id": 0},
    **SIZES,
)
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=None),
    "llama": LlamaConfig(vocab_size=61, **SIZES),
    "mistral": MistralConfig(vocab_size=61, sliding_window=5, num_key_value_heads=2, **SIZES),
    "granite": GraniteConfig(vocab_size=61, logits_scaling=8.0, embedding_multiplier=3.0, **SIZES),
    "cohere": CohereConfig(vocab_size=61, logit_scale=0.25, **{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "gemma2": Gemma2Config(vocab_size=61, final_logit_softcapping=2.0, num_key_value_heads=2, **SIZES),
    # The text settings lie inside; the decoder is not `base_model`; states in place of keys; and beside them.
    "gemma4": Gemma4Config(text_config=GEMMA4, vision_config=None, audio_config=None),
    "llama4": Llama4TextConfig(
        vocab_size=61, num_key_value_heads=2, num_local_experts=2, intermediate_size_mlp=48, **NO_TOKENS, **SIZES
    ),
    "mamba": MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8, **NO_TOKENS),
    "falcon-h1": FalconH1Config(vocab_size=61, num_key_value_heads=2, **HYBRID, **NO_TOKENS, **SIZES),
}


def make(name, implementation=None):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=implementation).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_the_model(name, ids):
    model = make(name)
    wrapped = TransformersModel(model)
    assert isinstance(wrapped, LanguageModel)
    assert wrapped.head.weight.shape == (61, 32)
    torch.testing.assert_close(wrapped(ids), model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("gpt2", "sdpa"),
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("mistral", "sdpa"),
        ("mistral", "eager"),
        ("gemma2", "eager"),
        ("granite", "sdpa"),
        ("cohere", "sdpa"),
    ],
)
@torch.no_grad()
def test_each_document_of_a_row_gets_the_logits_it_has_alone(name, implementation, ids):
    model = TransformersModel(make(name, implementation))
    documents = torch.tensor([0] * 7 + [1] * 1 + [2] * 9).expand(3, -1).contiguous()
    documents[1] = 4
    packed = model(ids, document_ids=documents)
    for row, start, stop in [(0, 0, 7), (0, 7, 8), (0, 8, 17), (1, 0, 17), (2, 8, 17)]:
        alone = model(ids[row : row + 1, start:stop])
        torch.testing.assert_close(packed[row : row + 1, start:stop], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_gradients_of_packed_rows_are_those_of_a_mask_of_all_pairs(name, checkpointing, ids):
    documents = torch.tensor([[0] * 9 + [1] * 8, [0] * 3 + [1] * 4 + [2] * 10, [5] * 17])
    gradients = []
    for implementation in ("sdpa", "eager"):  # the latter never asks torch for attention
        model = TransformersModel(make(name, implementation))
        if checkpointing:
            recompute_blocks(model, "blocks")
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = copy.deepcopy(model.model.config.to_dict())
        model(ids, document_ids=documents).square().sum().backward()
        assert model.model.config.to_dict() == before
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_rows_score_no_pair_of_two_documents(ids, monkeypatch):
    model, documents = TransformersModel(make("llama")), torch.tensor([[0] * 9 + [1] * 8] * 3)
    model(ids, document_ids=documents)  # the trial
    seen = []

    def noted(*args, **options):
        seen.append(options["mask"])
        return causal_attention(*args, **options)

    monkeypatch.setattr("lightning_lm.models.huggingface.document_attention.causal_attention", noted)
    model(ids, document_ids=documents)
    assert [mask.runs for mask in seen] == [((1, 9), (1, 8)) * 3] * 2


@torch.no_grad()
def test_positions_alone_do_not_part_a_row(ids):
    model = TransformersModel(make("llama"))
    positions = torch.arange(17).repeat(3, 1)
    torch.testing.assert_close(model(ids, position_ids=positions + 5), model(ids), rtol=0, atol=1e-5)
    restarting = positions % 8
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 61
    difference = model(ids, position_ids=restarting) - model(changed, position_ids=restarting)
    assert difference[:, -1].abs().max() > 0


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cached_logits_of_left_padded_rows_equal_uncached_ones(name, ids):
    model = TransformersModel(make(name))
    starts = torch.tensor([0, 4, 9])
    cache = model.make_cache(3, 17, starts)
    pieces = [model(ids[:, :10], cache=cache), model(ids[:, 10:11], cache=cache)]
    assert cache.length == 11
    kept = torch.tensor([0, 2])
    cache.select(kept)
    last = model(ids[kept, 11:], cache=cache)
    for row, start in enumerate(starts.tolist()):
        alone = model(ids[row : row + 1, start:])[0]
        torch.testing.assert_close(torch.cat(pieces, dim=1)[row, start:], alone[: 11 - start], rtol=0, atol=1e-5)
        if row in (0, 2):
            torch.testing.assert_close(last[row // 2], alone[11 - start :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("mamba", "falcon-h1")])
@torch.no_grad()
def test_rows_that_were_read_in_narrower_caches_go_on_in_one(name, ids):
    model = TransformersModel(make(name))
    whole = model.make_cache(3, 17, torch.tensor([0, 8, 3]))
    assert whole.can_join
    parts = []
    for rows, width, padding in (([0, 2], 10, [0, 3]), ([1], 2, [0])):
        cache = model.make_cache(len(rows), width, torch.tensor(padding))
        model(ids[rows, 10 - width : 10], cache=cache)
        parts.append((torch.tensor(rows), cache))
    whole.join(parts, 10)
    assert whole.length == 10
    found = model(ids[:, 10:], cache=whole)
    for row, start in enumerate([0, 8, 3]):
        alone = model(ids[row : row + 1, start:])[0]
        torch.testing.assert_close(found[row], alone[10 - start :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
@torch.no_grad()
def test_rows_go_back_by_counts_of_their_own(name, ids):
    model, starts = TransformersModel(make(name)), [0, 8, 3]
    for first in (torch.tensor(starts), None):
        cache = model.make_cache(3, 17, first)
        model(ids[:, :10], cache=cache)
        for kept in ([4, 4, 4], [2, 0, 4], [1, 1, 1], [0, 3, 0]):  # and all are taken back at last
            model(torch.randint(0, 61, (3, 4)), cache=cache)
            cache.rewind(4 - torch.tensor(kept))
            model(ids[:, :1], cache=cache)
            cache.rewind(torch.tensor(kept) + 1)
            cache.rewind(0)
        found = model(ids[:, 10:], cache=cache)
        for row, start in enumerate(starts if first is not None else [0, 0, 0]):
            alone = model(ids[row : row + 1, start:])[0]
            torch.testing.assert_close(found[row], alone[10 - start :], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_row_that_is_far_ahead_takes_no_room_from_others(ids):
    model = TransformersModel(make("llama"))
    cache = model.make_cache(3, 19)
    model(ids[:, :10], cache=cache)
    for kept in ([4, 0, 1], [0, 4, 1], [0, 0, 2], [1, 1, 1]):  # five of each row in the end, never of all at once
        model(torch.randint(0, 61, (3, 4)), cache=cache)
        cache.rewind(4 - torch.tensor(kept))
    assert cache.length == 15
    assert cache.starts is None


@pytest.mark.parametrize("name", ["mistral", "mamba", "falcon-h1"])
@torch.no_grad()
def test_what_drops_keys_or_has_states_cannot_go_back(name, ids):
    model = TransformersModel(make(name))
    cache = model.make_cache(3, 17)
    model(ids[:, :10], cache=cache)
    with pytest.raises(ConfigurationError, match="cannot go back"):
        cache.rewind(1)


def test_speculation_of_models_of_transformers_is_greedy_decoding():
    model, draft = make("llama"), make("llama")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.004 * torch.randn(weight.shape, generator=generator)
    prompts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (3, 11, 6)]
    options = {"sampling": Sampling(temperature=0), "max_new_tokens": 20}
    expected = Generator(TransformersModel(model)).generate(prompts, **options)
    speculation = Speculation(draft=TransformersModel(draft), num_tokens=3)
    assert Generator(TransformersModel(model), speculation=speculation).generate(prompts, **options) == expected


@pytest.mark.parametrize("name", ["mamba", "falcon-h1"])
def test_states_are_not_joined(name):
    assert not TransformersModel(make(name)).make_cache(2, 8).can_join


def test_a_model_with_its_text_settings_inside_is_described_and_measured():
    model = TransformersModel(make("gemma4"))
    assert model.logit_softcap == 2.0
    assert model.description.vocab_size == 61
    assert model.description.context_length == GEMMA4.max_position_embeddings
    assert type(model.description.build().model) is type(model.model)
    assert [shape.width for shape in attention_shapes(model)] == [4 * 8, 4 * 16]  # head_dim and global_head_dim


def test_what_cannot_work_is_refused(ids):
    model = TransformersModel(make("llama"))
    documents = torch.zeros_like(ids)
    documents[:, 8:] = 1
    with pytest.raises(ConfigurationError, match="restart at 0"):
        model(ids, document_ids=documents, position_ids=torch.arange(17).repeat(3, 1))
    cache = model.make_cache(3, 16)
    with pytest.raises(ConfigurationError, match="max_length=17"):
        model(ids, cache=cache)
    with pytest.raises(ConfigurationError, match="leave document_ids out"):
        model(ids, document_ids=documents, cache=cache)
    with pytest.raises(ConfigurationError, match="one number"):
        model.make_cache(3, 16, torch.zeros(2, dtype=torch.int64))


@torch.no_grad()
def test_soft_caps_by_another_name(ids):
    """Recurrent Gemma and xLSTM call theirs otherwise; without it every loss would be wrong."""
    layers = {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(
        RecurrentGemmaConfig(vocab_size=61, logits_soft_cap=0.1, attention_window_size=8, lru_width=32, **layers)
    ).eval()
    model.lm_head.weight.normal_()
    torch.testing.assert_close(TransformersModel(model)(ids), model(ids).logits, rtol=0, atol=1e-6)
    assert model(ids).logits.abs().max() > 0.09


def test_layers_between_decoder_and_head_are_refused():
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = ModernBertDecoderConfig(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    encoder = BertConfig(vocab_size=61, is_decoder=True, **sizes)
    for settings, layer in ((config, "lm_head.dense.weight"), (encoder, "cls.predictions.transform.dense.weight")):
        model = AutoModelForCausalLM.from_config(settings)
        assert as_language_model(model) is model  # its own forward makes the logits
        with pytest.raises(ConfigurationError, match=f"more than a linear head behind its decoder .*{layer}"):
            TransformersModel(model)


def test_other_models_are_refused():
    with pytest.raises(ConfigurationError, match="AutoModelForCausalLM"):
        TransformersModel(torch.nn.Linear(2, 2))
    scaled = make("llama")
    scaled.config.logits_scaling = 8.0
    with pytest.raises(ConfigurationError, match=r"not known here ..'logits_scaling': 8\.0"):
        TransformersModel(scaled)
    scaled.config = T5Config()
    with pytest.raises(ConfigurationError, match="AutoModelForCausalLM"):
        TransformersModel(scaled)


def with_adapters(name):
    """A bare ``PeftModel`` whose adapters say something."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(make(name), settings).eval()


@pytest.mark.parametrize("name", ["llama", "granite"])
@torch.no_grad()
def test_documents_stay_apart_also_with_adapters(name, ids):
    """Against the bare model on each document alone; without its adapters it says something else."""
    bare = with_adapters(name)
    model = as_language_model(bare)
    documents = torch.tensor([0] * 7 + [1] * 10).expand(3, -1).contiguous()
    packed = model(ids, document_ids=documents)
    for start, stop in ((0, 7), (7, 17)):
        alone = bare(input_ids=ids[:, start:stop]).logits
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=2e-6)
        assert not torch.allclose(make(name)(ids[:, start:stop]).logits, alone, atol=1e-3)
    together = bare(input_ids=ids).logits
    assert not torch.allclose(together[:, 7:], packed[:, 7:], atol=1e-3)  # what it was without the documents


@torch.no_grad()
def test_packed_rows_are_refused_by_what_cannot_keep_documents_apart(ids):
    peft = pytest.importorskip("peft")
    unknown = make("llama")
    unknown.config.logits_scaling = 8.0
    prompted = peft.get_peft_model(make("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    documents = torch.arange(17).expand(3, -1) // 9
    for model in (unknown, prompted):
        assert as_language_model(model) is model
        with pytest.raises(ConfigurationError, match=r"cannot be told to keep them apart.*--data.packing OnePerRow"):
            whole_logits(model, {"input_ids": ids, "document_ids": documents})
        whole = model(input_ids=ids).logits[:, -17:]
        torch.testing.assert_close(whole_logits(model, {"input_ids": ids}), whole)
        torch.testing.assert_close(whole_logits(model, {"input_ids": ids, "document_ids": documents * 0}), whole)
