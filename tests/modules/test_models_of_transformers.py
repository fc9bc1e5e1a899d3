"""A causal language model of transformers as it is: packed documents stay apart, caches and critics work."""

import copy

import pytest
import torch

from lightning_lm.models import TransformersModel, as_language_model
from lightning_lm.modules import GRPOModule, KLReward, PPOModule, RolloutPlan, SFTModule
from lightning_lm.optim import SGD, AdamW, Constant

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOKENS = {"bos_token_id": None, "eos_token_id": None}
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=64, **TOKENS),
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
}


@pytest.fixture
def theirs():
    def make(name):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    return make


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(31, (length,), generator=generator) for length in (7, 12, 4)]


def packed_row():
    """All documents in one row; the first token of each is no target."""
    parts = documents()
    labels = torch.cat([torch.cat([torch.tensor([-100]), part[1:]]) for part in parts])
    return {
        "input_ids": torch.cat(parts)[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(len(part)) for part in parts])[None],
        "document_ids": torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])[None],
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_on_a_packed_row_is_that_on_its_documents(theirs, make_trainer, name):
    """Against a step of transformers' own loss on each document by itself, in a model that is the same object."""
    wanted = theirs(name)
    losses = [
        torch.nn.functional.cross_entropy(wanted(part[None]).logits[0, :-1], part[1:], reduction="sum")
        for part in documents()
    ]
    (sum(losses) / sum(len(part) - 1 for part in documents())).backward()
    model = theirs(name)
    module = SFTModule(model, optimizer=SGD(lr=1.0, momentum=0.0, weight_decay=0.0), schedule=Constant())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(max_steps=1).fit(module, torch.utils.data.DataLoader([packed_row()], batch_size=None))
    for name, parameter in wanted.named_parameters():
        step = before[name] - model.state_dict()[name]
        torch.testing.assert_close(step, parameter.grad, rtol=0, atol=2e-6)


def test_a_model_that_was_given_in_evaluation_mode_trains_with_its_dropout(make_trainer):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).eval()  # as from_pretrained returns it
    dropped = []

    def note(module, given, out):
        if torch.is_grad_enabled():  # not when it is tried whether documents stay apart
            dropped.append(not torch.equal(out, given[0]))

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(note)
    row = packed_row()
    make_trainer(max_steps=1).fit(SFTModule(model), torch.utils.data.DataLoader([row], batch_size=None))
    assert dropped
    assert all(dropped)


@pytest.mark.parametrize("kind", [GRPOModule, PPOModule])
def test_it_is_a_policy_with_a_cache_and_a_critic(theirs, prompt_data, make_trainer, kind):
    module = kind(
        theirs("llama"),
        rewards=[lambda *, completions, **columns: [sum(map(ord, text)) % 5 for text in completions]],
        plan=RolloutPlan(samples_per_prompt=4, max_new_tokens=4, minibatches=2, importance_cap=2.0),
        optimizer=AdamW(lr=1e-3),
        **({"kl": KLReward()} if kind is PPOModule else {}),
    )
    differences = []
    module.record_max = lambda name, value: differences.append(float(value)) if "logp_difference" in name else None
    make_trainer(max_steps=4, max_epochs=-1, limit_val_batches=0).fit(module, prompt_data())
    assert hasattr(module.model, "make_cache")
    assert max(differences) < 1e-4


def test_other_modules_stay_as_they_are(theirs):
    scaled = theirs("llama")
    scaled.config = copy.deepcopy(scaled.config)
    scaled.config.logits_scaling = 8.0  # a Llama that would not heed it
    judge = transformers.LlamaForSequenceClassification(CONFIGS["llama"])
    for module in (torch.nn.Linear(2, 2), TransformersModel(theirs("llama")), scaled, judge):
        assert as_language_model(module) is module
