"""Models that mix the documents of packed rows are found by a trial; the oracle is the model on each document alone."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import TransformerConfig, TransformersModel
from lightning_lm.models.own_model import accepted_inputs, mixed_documents, whole_logits
from lightning_lm.models.packing_trial import keeps_documents_apart
from lightning_lm.modules import PretrainModule, SFTModule
from lightning_lm.optim import AdamW, Constant

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FULL = {"layer_types": ["full_attention", "full_attention"]}
MAMBA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
APART = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mixtral": transformers.MixtralConfig(**SIZES, **EXPERTS),
    "gemma3": transformers.Gemma3TextConfig(**SIZES),
    "gpt2": transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, eos_token_id=None),
}
MIXED = {
    "gpt-oss": transformers.GptOssConfig(**SIZES, **EXPERTS, **FULL),
    "mamba": transformers.MambaConfig(**MAMBA),
    "opt": transformers.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "falcon-h1": transformers.FalconH1Config(**SIZES, **HYBRID),
    "lfm2": transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
}


def make(config, dtype=torch.float32):
    torch.manual_seed(0)
    return TransformersModel(transformers.AutoModelForCausalLM.from_config(config).to(dtype))


@pytest.fixture
def packed():
    ids = torch.randint(1, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "document_ids": torch.tensor([0] * 7 + [1] * 10).expand(2, -1).contiguous()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", APART)
def test_models_that_keep_documents_apart_take_packed_rows(name, dtype, packed):
    assert make(APART[name], dtype).train()(**packed).requires_grad


@pytest.mark.parametrize("config", [APART["gpt2"], MIXED["opt"]], ids=["apart", "mixed"])
def test_a_trial_leaves_modes_and_the_random_state_as_they_were(config):
    """Both have dropout, under which no two outputs would be alike."""
    model = make(config).train()
    model.model.get_input_embeddings().eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    assert trial(model) is (config is APART["gpt2"])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def trial(model):
    def run(inputs):
        return model.model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits

    return keeps_documents_apart(model, run, num_ids=61, device=torch.device("cpu"))


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_models_that_mix_documents_refuse_packed_rows(name, packed):
    model = make(MIXED[name]).eval()
    theirs = type(model.model).__name__
    with pytest.raises(ConfigurationError, match=f"{theirs}.*--data.packing OnePerRow.*--data.rows.packing OnePerRow"):
        model(**packed)
    with pytest.raises(ConfigurationError, match=theirs):  # and again
        model(**packed)
    # A row with padding behind its only document is none of several, and has the logits of that document.
    ids = packed["input_ids"].clone()
    ids[:, 7:] = 0
    logits = model(ids, document_ids=packed["document_ids"])
    torch.testing.assert_close(logits[:, :7], model.model(input_ids=ids[:, :7]).logits, rtol=0, atol=1e-5)


def test_a_model_is_tried_once(packed):
    model = make(APART["llama"])
    calls = []
    model.model.model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    for _ in range(3):
        model.hidden(packed["input_ids"])  # no documents, no trial
    assert len(calls) == 3
    for _ in range(3):
        model.hidden(**packed)
    assert len(calls) == 3 + 1 + 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trial(model)


BOTH = ["document_ids", "position_ids"]


class Own(nn.Module):
    """A model that averages the tokens so far; ``apart`` averages those of the same document only."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.embed, self.out, self.apart = nn.Embedding(61, 16), nn.Linear(16, 61), apart

    def forward(self, input_ids, document_ids=None):
        sees = torch.ones(input_ids.shape[1], input_ids.shape[1]).tril()[None]
        if self.apart and document_ids is not None:
            sees = sees * (document_ids[:, :, None] == document_ids[:, None])
        return self.out((sees / sees.sum(-1, keepdim=True)) @ self.embed(input_ids))


class Blind(Own):
    def forward(self, ids):
        return super().forward(ids)


class Numb(Own):
    def forward(self, input_ids, position_ids=None, **others):
        return super().forward(input_ids)


@pytest.mark.parametrize(
    ("model", "how", "takes"),
    [
        (Own(apart=True), None, ["document_ids"]),
        (Own(apart=False), "takes document_ids, but", ["document_ids"]),
        (Blind(apart=False), "does not take document_ids and position_ids", []),
        (Numb(apart=False), "takes document_ids, but", BOTH),
        (TransformerConfig(vocab_size=61, d_model=16, num_layers=1).build(), None, BOTH),
    ],
    ids=["apart", "ignores", "blind", "any", "ours"],
)
def test_of_a_users_own_model_it_is_said_how_it_mixes_documents(model, how, takes, packed):
    torch.manual_seed(0)
    inputs = {**packed, "position_ids": torch.arange(17).expand(2, -1)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = [accepted_inputs(model, inputs) for _ in range(2)]
    assert list(given[1]) == list(given[0]) == ["input_ids", *takes]
    assert [how in str(warning.message) for warning in caught] == ([] if how is None else [True])  # once
    found = mixed_documents(model, inputs)
    assert (found is None) if how is None else found.startswith(how)


def test_a_model_of_ids_alone_is_pretrained_and_fine_tuned(packed):
    """Against its own loss by torch, on the ids that it takes."""
    for kind in (PretrainModule, SFTModule):
        torch.manual_seed(0)
        model = Blind(apart=False)
        logits = model(packed["input_ids"][:, :-1])
        wanted = nn.functional.cross_entropy(logits.flatten(0, 1), packed["input_ids"][:, 1:].flatten())
        module = kind(model, optimizer=AdamW(lr=1e-3), schedule=Constant())
        batch = {**packed, "labels": packed["input_ids"]}
        with pytest.warns(UserWarning, match="Blind does not take document_ids.*OnePerRow"):
            loss = module.training_loss(batch)
        torch.testing.assert_close(loss.nll_sum / loss.num_tokens, wanted.double())


def test_what_is_no_model_of_all_logits_is_named(packed):
    class Last(Blind):
        def forward(self, ids):
            return super().forward(ids)[:, -1:], None

    with pytest.raises(ConfigurationError, match=r"Last.forward returned \(2, 1, 61\).*logits of every token"):
        whole_logits(Last(apart=False), {"input_ids": packed["input_ids"]})
