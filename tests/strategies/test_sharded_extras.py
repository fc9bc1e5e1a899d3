"""What else runs on a mesh: averages of weights, models of transformers, compiled layers, dropout, refusals."""

import dataclasses
import re

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from split_runs import model_config, run
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lm.callbacks import EMA
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.dtensor import local_part
from lightning_lm.models import GLU, Layer, TransformersModel
from lightning_lm.models.attention import Mixer
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import AdamW, Constant
from lightning_lm.strategies import TensorParallelStrategy

TP2, FSDP2 = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 1}
SP2 = {**TP2, "sequence_parallel": True}


def averaged(settings, **options):
    return run("auto" if settings is None else TensorParallelStrategy(**settings), callbacks=[EMA(0.7)], **options)[2]


@pytest.mark.parametrize(("size", "settings"), [(2, SP2), (2, FSDP2), (4, SP2)], ids=["tp2", "fsdp2", "2 x 2"])
def test_the_average_of_shared_weights(ranks, size, settings):
    found = ranks(size).run(averaged, settings)[0]
    for name, weight in averaged(None).items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-8)


def average_of_lightning():
    try:
        run(TensorParallelStrategy(2), callbacks=[EMAWeightAveraging()])
    except RuntimeError as error:
        return str(error)
    return None


def test_the_callback_of_lightning_fails_where_ours_works(ranks):
    said = ranks(2).run(average_of_lightning)[0]
    if said is None:
        pytest.skip("this Lightning averages shared weights")
    assert "mixed torch.Tensor and DTensor" in said


LLAMA_PLAN = {
    "*.embed_tokens": "embed",
    "*.self_attn": "gather",
    "*.self_attn.[qkv]_proj": "colwise",
    "*.self_attn.o_proj": "rowwise",
    "*.mlp": "gather",
    "*.mlp.gate_proj": "colwise",
    "*.mlp.up_proj": "colwise",
    "*.mlp.down_proj": "rowwise",
    "*.lm_head": "head",
}


class Packed(PretrainModule):
    """Gives each row two documents, so that the model is tried before its first step."""

    def training_loss(self, batch):
        documents = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) // 8
        return super().training_loss({**batch, "document_ids": documents})


def llama(settings, *, tied=False, packed=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = TransformersModel(LlamaForCausalLM(config))
    kind = Packed if packed else PretrainModule
    module = kind(model, optimizer=AdamW(lr=1e-2), schedule=Constant())
    strategy = "auto" if settings is None else TensorParallelStrategy(**settings)
    return run(strategy, module=module, config=model_config(97), gradient_clip_val=0.5)[0]


@pytest.mark.parametrize("form", [{}, {"tied": True, "packed": True}], ids=["plain", "tied and packed"])
@pytest.mark.parametrize("settings", [{**TP2, "plan": LLAMA_PLAN}, FSDP2], ids=["tp2", "fsdp2"])
def test_a_model_of_transformers(ranks, settings, form):
    found = ranks(2).run(llama, settings, **form)[0]
    torch.testing.assert_close(found, llama(None, **form), rtol=0, atol=1e-8)


def with_dropout(settings):
    config = dataclasses.replace(model_config(), dropout=0.2)
    losses, _, weights = run(TensorParallelStrategy(**settings), config=config)
    return losses, weights["model.layers.0.mixer_norm.weight"]


def test_ranks_that_share_matrices_drop_the_same_features(ranks):
    (losses, norm), (other_losses, other_norm) = ranks(2).run(with_dropout, TP2)
    assert losses == other_losses
    assert torch.equal(norm, other_norm)  # whole on both; other masks would pull them apart
    alone = run(config=dataclasses.replace(model_config(), dropout=0.2))[0]
    torch.testing.assert_close(losses, alone, rtol=0, atol=1e-9)


def recomputed(settings):
    module = PretrainModule(
        model_config(), optimizer=AdamW(lr=1e-2), schedule=Constant(), activation_checkpointing="blocks"
    )
    return run(TensorParallelStrategy(**settings), module=module)[0]


@pytest.mark.parametrize("settings", [SP2, FSDP2], ids=["tp2 sp", "fsdp2"])
def test_layers_that_are_computed_again(ranks, settings):
    found = ranks(2).run(recomputed, settings)[0]
    torch.manual_seed(1)
    module = PretrainModule(model_config(), optimizer=AdamW(lr=1e-2), schedule=Constant())
    torch.testing.assert_close(found, run(module=module)[0], rtol=0, atol=1e-9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(Mixer):
    def build(self, d_model, *, norm):
        return Unplanned(d_model)


class Unplanned(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.map = nn.Linear(d_model, d_model)

    def forward(self, x, context, state=None):
        return self.map(x)


def refused(settings, config):
    with pytest.raises(ConfigurationError) as caught:
        run(TensorParallelStrategy(**settings), config=config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        (
            {"tensor_parallel_size": 3},
            model_config(),
            "tensor_parallel_size=3 does not divide the 2 processes; use 1, 2",
        ),
        (
            TP2,
            model_config(attention={"num_kv_heads": 1}),
            "tensor_parallel_size=2 does not divide num_kv_heads=1; use 1",
        ),
        (TP2, model_config(layers=Layer(mixer=Identity(), ffn=GLU(hidden_size=32))), "Unplanned.*has no parallel_plan"),
        ({**TP2, "plan": {"*.unheard_of": "colwise"}}, model_config(), "'.*unheard_of', and there is no such module"),
        ({**TP2, "plan": {"*.q": "sideways"}}, model_config(), "the role 'sideways'; use embed, positions"),
        ({**SP2, "plan": {"*.q": "colwise"}}, model_config(), "sequence_parallel needs a model"),
    ],
    ids=["ranks", "heads", "no plan", "no module", "no role", "sequence"],
)
def test_what_cannot_be_split_is_refused(ranks, settings, config, message):
    for said in ranks(2).run(refused, settings, config):
        assert re.search(message, said), said


def compiled(settings):
    torch.manual_seed(1)
    model = model_config().build()
    if settings is not None:
        for layer in model.layers:
            layer.compile(backend="aot_eager")  # what is traced is the same for every backend, and this one is quick
    module = PretrainModule(model, optimizer=AdamW(lr=1e-2), schedule=Constant())
    return run("auto" if settings is None else TensorParallelStrategy(**settings), module=module)[0]


@pytest.mark.parametrize("settings", [TP2, SP2, FSDP2], ids=["tp2", "tp2 sp", "fsdp2"])
def test_compiled_layers(ranks, settings):
    torch.testing.assert_close(ranks(2).run(compiled, settings)[0], compiled(None), rtol=0, atol=1e-9)


def held(settings):
    """Return how many numbers of weights and of optimizer state this rank holds."""
    torch.manual_seed(1)
    module = PretrainModule(model_config(), optimizer=AdamW(lr=1e-2), schedule=Constant())
    run(TensorParallelStrategy(**settings), module=module, steps=1)
    state = [value for values in module.optimizers().state.values() for value in values.values() if value.dim()]
    return [sum(local_part(tensor).numel() for tensor in tensors) for tensors in (module.parameters(), state)]


@pytest.mark.parametrize(("size", "settings"), [(2, TP2), (2, FSDP2), (4, TP2)], ids=["tp2", "fsdp2", "2 x 2"])
def test_each_rank_holds_its_part(ranks, size, settings):
    model = model_config().build()
    total = sum(parameter.numel() for parameter in model.parameters())
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2)
    for parameters, state in ranks(size).run(held, settings):
        assert total / size <= parameters <= total / size + vectors
        assert state == 2 * parameters
