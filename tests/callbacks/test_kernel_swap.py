"""Exchanged layers: the same training, every refusal with its reason, nothing left behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention

from lightning_lm.callbacks import KernelSwap
from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels.swap.swap import last_call, restore, swap
from lightning_lm.models import GLU, MLP, Attention, Layer, RMSNorm, Rope, TransformerConfig
from lightning_lm.modules import PretrainModule

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THEIRS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma2": Gemma2Config}


class Theirs(LightningModule):
    """Any module with any model, as a user writes it."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config)
        self.losses = []

    def training_step(self, batch, _):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def trained(module, steps, *callbacks):
    generator = torch.Generator().manual_seed(0)
    rows = DataLoader(torch.randint(0, 50, (2, 12), generator=generator).repeat(steps, 1), batch_size=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=steps, callbacks=[*callbacks], accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, rows)
    return module


class Kernels(KernelSwap):
    """Remembers what was exchanged, which is forgotten once training ends."""

    def on_train_start(self, trainer, pl_module):
        self.names = {entry.kernel.split()[0] for entry in self.swapped if entry.kernel}


@pytest.mark.parametrize("name", THEIRS)
def test_a_model_of_transformers_trains_alike_and_is_put_back(name):
    plain = trained(Theirs(THEIRS[name](**SIZES)), 8)
    callback = Kernels()
    exchanged = Theirs(THEIRS[name](**SIZES))
    before = {path: (type(layer), set(vars(layer))) for path, layer in exchanged.named_modules()}
    names = list(exchanged.state_dict())
    trained(exchanged, 8, callback)
    needed = {"rms_norm", *({"geglu"} if name == "gemma2" else {"swiglu", "rope"})}
    optional = {"rope"} if name == "gemma2" else set()  # depends on the release of transformers
    assert needed <= callback.names <= needed | optional
    torch.testing.assert_close(torch.tensor(exchanged.losses), torch.tensor(plain.losses), atol=1e-5, rtol=0)
    assert plain.losses[-1] < plain.losses[0]
    after = {path: (type(layer), set(vars(layer))) for path, layer in exchanged.named_modules()}
    assert list(exchanged.state_dict()) == names
    assert {path: kind for path, kind in after.items() if path} == {path: kind for path, kind in before.items() if path}
    assert "configure_model" not in vars(exchanged)


def calls(model, monkeypatch):
    """Count calls of layers' own methods."""
    seen, own = [], type(model.model.layers[0].self_attn).forward

    def counted(self, *args, **kwargs):
        seen.append(self.layer_idx)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", counted)
    return seen


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_attention_of_transformers_goes_by_kernels_unless_it_is_given_a_mask(config, kind, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES))
    plain = copy.deepcopy(model)
    done = {entry.module: entry for entry in swap(model)}
    assert done["model.layers.1.self_attn"].kernel == "rope and attention"
    ids, given = torch.randint(0, 50, (2, 9)), {}
    if kind == "padded":
        given["attention_mask"] = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    if kind == "packed":
        given["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    expected, seen = plain(ids, use_cache=False, **given).logits, calls(model, monkeypatch)
    torch.testing.assert_close(model(ids, use_cache=kind == "plain", **given).logits, expected, atol=1e-6, rtol=0)
    assert seen == ([] if kind == "plain" else [0, 1])
    reason = last_call(done["model.layers.0.self_attn"])
    assert reason == (
        "" if kind == "plain" else "it is given a mask of all pairs, for packed or padded rows or a window"
    )


class GivenMore(LlamaAttention):
    """A later release, whose layers are given an argument that nobody here has heard of."""

    def forward(self, hidden_states, *args, tilt=None, **kwargs):
        return super().forward(hidden_states if tilt is None else hidden_states * tilt, *args, **kwargs)


class Tilted(Theirs):
    """A module whose first layer is called with an argument that the kernel does not know."""

    def __init__(self, config):
        super().__init__(config)
        layer = self.model.model.layers[0]
        layer.self_attn = GivenMore(self.model.config, 0)
        layer.register_forward_pre_hook(lambda _, args, given: (args, {**given, "tilt": 0.5}), with_kwargs=True)
        self.unused = nn.LayerNorm(4)

    def validation_step(self, batch, _):
        self.model(input_ids=batch)


def test_kernels_that_do_not_run_in_the_real_model_are_named():
    with pytest.warns(UserWarning, match="2 of 10 swapped layers did not run their kernels") as seen:
        trained(Tilted(LlamaConfig(**SIZES)), 2, KernelSwap())
    (text,) = [str(one.message) for one in seen if "did not run their kernels" in str(one.message)]
    assert "model.model.layers.*.self_attn  1       GivenMore  rope and attention  it is given tilt, which" in text
    assert "unused" in text
    assert "its method was not called" in text


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_that_all_kernels_ran_is_reported_once(run, caplog):
    module, rows = Tilted(LlamaConfig(**SIZES)), DataLoader(torch.randint(0, 50, (4, 12)), batch_size=2)
    del module.unused
    module.model.model.layers[0]._forward_pre_hooks.clear()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=2, callbacks=[KernelSwap()], accelerator="cpu", enable_model_summary=False, **quiet)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.validate(module, rows) if run == "validate" else trainer.fit(module, rows, rows)
    assert caplog.messages.count("All 9 swapped layers ran their kernels in the first batch.") == 1


def test_notes_of_calls_are_left_by_compiled_layers_too_and_taken_away():
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    first, second = swap(model)
    assert last_call(first) is None
    torch.compile(model[0], backend="eager", fullgraph=True)(torch.randn(2, 8))
    assert (last_call(first), last_call(second)) == ("", None)
    restore([first, second])
    assert all("last_call" not in name for name in vars(model[0]))


def test_an_exchanged_model_generates_with_its_own_cache():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    ids, options = torch.randint(3, 50, (2, 5)), {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    done = swap(model)
    assert torch.equal(model.generate(ids, **options), expected)
    restore(done)
    assert "forward" not in vars(model.model.layers[0].self_attn)


class ReversedAttention(LlamaAttention):
    """Looks like its parent and turns the other way."""

    def forward(self, hidden_states, position_embeddings, *args, **kwargs):
        return super().forward(hidden_states, (position_embeddings[0], -position_embeddings[1]), *args, **kwargs)


def attention_layer(kind=LlamaAttention, implementation="sdpa", **options):
    config = LlamaConfig(**SIZES, **options)
    config._attn_implementation = implementation
    return kind(config, 0)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (attention_layer(), ""),
        (attention_layer(ReversedAttention), "something else than rope and attention"),
        (attention_layer(implementation="eager"), "asks for eager attention, which is given a mask of all pairs"),
        (attention_layer(implementation="flash_attention_2"), "flash_attention_2 attention, which is left alone"),
        (attention_layer(attention_dropout=0.1), "dropout=0.1 of attention weights"),
    ],
    ids=["llama", "reversed", "eager", "flash", "dropout"],
)
def test_which_attention_is_exchanged(layer, reason):
    (entry,) = swap(nn.Sequential(layer))
    assert bool(entry.kernel) == (not reason)
    assert reason in entry.reason


def test_of_gpt2_the_norms_are_exchanged_and_the_rest_is_explained():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, eos_token_id=0))
    plain = copy.deepcopy(model)
    done = {entry.module: entry for entry in swap(model)}
    assert done["transformer.ln_f"].kernel == done["transformer.h.0.ln_1"].kernel == "layer_norm"
    assert done["transformer.h.0.mlp"].reason == "it has no gate"
    assert "not in a method of their own" in done["transformer.h.0.attn"].reason
    ids = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits, atol=1e-5, rtol=0)


def ours(**options):
    layers = (
        Layer(mixer=Attention(num_heads=2, qk_norm="head", rope=Rope(fraction=0.5)), ffn=GLU()),
        Layer(mixer=Attention(num_heads=2, num_kv_heads=1, window=5, softcap=20.0), ffn=GLU(activation="gelu")),
    )
    torch.manual_seed(0)
    return TransformerConfig(vocab_size=50, d_model=32, num_layers=2, layers=layers, **options).build()


@pytest.mark.parametrize("norm", [RMSNorm(), RMSNorm(offset=1.0), RMSNorm(affine=False)], ids=str)
def test_our_own_model_gives_the_same_with_packed_documents(norm):
    plain, model = ours(norm=norm), ours(norm=norm)
    done = swap(model)
    assert {entry.kernel.split()[0] for entry in done} == {"rms_norm", "rope", "swiglu", "geglu"}
    ids, documents = torch.randint(0, 50, (2, 24)), (torch.arange(24) // 10).expand(2, -1)
    results = [one(ids, document_ids=documents) for one in (plain, model)]
    torch.testing.assert_close(results[1], results[0], atol=2e-6, rtol=0)
    gradients = [
        torch.autograd.grad(one.square().sum(), tuple(m.parameters()))
        for one, m in zip(results, (plain, model), strict=True)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)
    restore(done)
    assert all("forward" not in vars(layer) and "attend" not in vars(layer) for layer in model.modules())


def test_a_copy_of_an_exchanged_model_uses_its_own_weights():
    model = ours()
    swap(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm.weight.zero_()
    ids = torch.randint(0, 50, (1, 7))
    assert twin(ids).eq(0).all()
    assert model(ids).ne(0).any()


class Gated(nn.Module):
    """Somebody's feed-forward layer."""

    def __init__(self, activation, dropout=None):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.activation = activation
        if dropout is not None:
            self.drop = nn.Dropout(dropout)
        nn.init.zeros_(self.w2.weight)  # whatever goes in, nothing comes out at first

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class BiasedRMSNorm(nn.Module):
    """Somebody's norm."""

    def __init__(self):
        super().__init__()
        self.eps, self.weight, self.bias = 1e-6, nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return F.rms_norm(x, (8,), self.weight, self.eps) + self.bias


class CenteredRMSNorm(nn.RMSNorm):
    """Looks like one and is none."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("layer", "kernel", "reason"),
    [
        (Gated(F.silu), "swiglu", ""),
        (Gated(nn.GELU("tanh")), "geglu (tanh)", ""),
        (Gated(F.gelu), "geglu", ""),
        (Gated(torch.sigmoid), "", "something else than swiglu, geglu"),
        (Gated(F.silu, dropout=0.1), "", "it also holds drop, a Dropout"),
        (nn.RMSNorm(8, eps=1e-6), "rms_norm", ""),
        (nn.RMSNorm(8), "", "eps=None"),
        (BiasedRMSNorm(), "", "a parameter that the kernel does not know: bias"),
        (CenteredRMSNorm(8, eps=1e-6), "", "something else than rms_norm"),
        (nn.BatchNorm1d(8), "", "no kernel for BatchNorm1d"),
        (nn.Linear(8, 8), None, ""),
        (nn.LayerNorm(8), "layer_norm", ""),
        (nn.LayerNorm(8, elementwise_affine=False), "layer_norm", ""),
        (nn.LayerNorm((2, 8)), "", "it normalises 2 axes together"),
        (nn.RMSNorm(8, eps=1e-6, device="meta"), "rms_norm", ""),
        (nn.RMSNorm(8, eps=1e-6, dtype=torch.bfloat16), "rms_norm", ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_is_exchanged_and_why_not(layer, kernel, reason):
    done = swap(nn.Sequential(layer), device=torch.device("cpu"))
    if kernel is None:
        assert done == []
        return
    (entry,) = done
    assert entry.kernel == kernel
    assert reason in entry.reason
    assert bool(entry.reason) != bool(kernel)


def test_a_forward_that_somebody_replaced_is_left_alone():
    layer = nn.RMSNorm(8, eps=1e-6)
    layer.forward = mine = lambda x: x
    (entry,) = swap(nn.Sequential(layer))
    assert (entry.kernel, entry.reason) == ("", "its forward was replaced by other code")
    restore([entry])
    assert layer.forward is mine


def test_include_and_exclude():
    model = ours()
    done = swap(model, include=["layers.*"], exclude=["*.ffn"])
    chosen = {entry.module for entry in done if entry.kernel}
    assert {"layers.0.mixer", "layers.1.mixer_norm"} <= chosen
    assert not {"layers.0.ffn", "norm"} & chosen
    reasons = {entry.module: entry.reason for entry in done}
    assert (reasons["layers.0.ffn"], reasons["norm"]) == ("excluded by '*.ffn'", "not included")


def test_nothing_to_exchange_is_an_error_and_leaves_nothing_behind():
    config = TransformerConfig(vocab_size=50, d_model=16, num_layers=1, layers=Layer(ffn=MLP()))
    module = PretrainModule(config.build())
    with pytest.raises(ConfigurationError, match=r"nothing to exchange.*Change include or exclude"):
        trained(module, 1, KernelSwap(include=["nowhere"]))
    assert "configure_model" not in vars(module)


def test_the_table(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trained(Theirs(LlamaConfig(**SIZES)), 1, KernelSwap())
    table = next(text for text in caplog.messages if text.startswith("Kernels exchanged"))
    assert "they run in torch (tensors on cpu" in table
    assert [line.split()[:4] for line in table.splitlines() if "mlp" in line] == [
        ["model.model.layers.*.mlp", "2", "LlamaMLP", "swiglu"]
    ]
