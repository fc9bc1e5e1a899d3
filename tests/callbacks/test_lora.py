"""Adapters on any module's model: only they learn, the merged model says the same, a run resumes."""

import dataclasses

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lm.callbacks import Adapters, LoRA, load_merged, merge_adapters
from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models import (
    Attention,
    Layer,
    Transformer,
    TransformerConfig,
    TransformersModel,
    export_model,
    load_huggingface,
    remove_adapters,
    save_huggingface,
)
from lightning_lm.models.huggingface.folder import load_pretrained
from lightning_lm.modules import PretrainModule, adapters_off
from lightning_lm.optim import AdamW, Constant

CONFIG = TransformerConfig(
    vocab_size=31, d_model=16, num_layers=2, layers=Layer(mixer=Attention(num_heads=2)), context_length=8
)


def rows(count=8):  # two batches an epoch: a checkpoint at its end needs no position
    ids = torch.randint(31, (count, 9), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)


def pretraining(config=CONFIG) -> PretrainModule:
    torch.manual_seed(0)
    return PretrainModule(config, optimizer=AdamW(lr=1e-2), schedule=Constant())


@pytest.fixture
def fit(tmp_path):
    def run(module, steps=4, *, lora=None, resume=None, folder="checkpoints"):
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[lora or LoRA(Adapters(rank=2)), saver],
        )
        trainer.fit(module, rows(), ckpt_path=resume)
        return module

    return run


def probe():
    return torch.randint(31, (3, 8), generator=torch.Generator().manual_seed(1))


def test_only_adapters_learn_and_begin_as_nothing(fit):
    torch.manual_seed(0)
    begin = CONFIG.build()
    module = fit(pretraining())
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 2  # two factors for each of the seven matrices of each of two layers
    now = module.model.state_dict()
    for name, value in begin.state_dict().items():
        kept = name if name in now else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(now[kept], value)
    with adapters_off(module.model), torch.no_grad():
        assert torch.equal(module.model(probe()), begin(probe()))
    with torch.no_grad():
        assert not torch.equal(module.model(probe()), begin(probe()))


def test_the_merged_model_says_the_same_and_has_no_adapters(fit, tmp_path):
    module = fit(pretraining())
    module.model.eval()
    merged = merge_adapters(module.model)
    assert merged.state_dict().keys() == CONFIG.build().state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(merged(probe()), module.model(probe()), rtol=1e-5, atol=1e-5)
    assert any("lora_" in name for name in module.model.state_dict())  # the one that trains stays as it is
    save_huggingface(merged, tmp_path / "exported")
    with torch.no_grad():
        torch.testing.assert_close(load_huggingface(tmp_path / "exported")(probe()), merged(probe()))


def test_a_checkpoint_loads_merged(fit, tmp_path):
    module = fit(pretraining())
    loaded, tokenizer = load_merged(tmp_path / "checkpoints" / "step=4.ckpt")
    assert tokenizer is None
    expected = merge_adapters(module.model).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_resumes_bit_for_bit(fit, tmp_path):
    whole = fit(pretraining(), 4)
    resumed = fit(pretraining(), 4, resume=tmp_path / "checkpoints" / "step=2.ckpt", folder="rest")
    first, second = whole.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_modules_beside_the_adapters_can_be_trained_whole(fit):
    module = fit(pretraining(), lora=LoRA(Adapters(rank=2, targets=("q", "v"), trained=("head",))))
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert sum("lora_" in name for name in trained) == 2 * 2 * 2
    assert [name for name in trained if "lora_" not in name] == ["head.modules_to_save.default.weight"]
    merged = merge_adapters(module.model)
    assert torch.equal(merged.head.weight, module.model.head.modules_to_save["default"].weight)
    torch.manual_seed(0)
    assert not torch.equal(merged.head.weight, CONFIG.build().head.weight)


def test_errors_leave_the_adapters_on(fit):
    module = fit(pretraining())
    before = [parameter.requires_grad for parameter in module.model.parameters()]
    with torch.no_grad():
        said = module.model(probe())
    with pytest.raises(KeyError), adapters_off(module.model):
        raise KeyError
    assert [parameter.requires_grad for parameter in module.model.parameters()] == before
    with torch.no_grad():
        assert torch.equal(module.model(probe()), said)


class Foreign(LightningModule):
    """Of somebody else: a model under a name of its own, made in the constructor."""

    def __init__(self):
        super().__init__()
        self.net = CONFIG.build()

    def training_step(self, batch, batch_idx):
        logits = self.net(batch["input_ids"][:, :-1]).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_any_module_will_do(fit):
    module = fit(Foreign(), lora=LoRA(Adapters(rank=2), attribute="net"))
    assert sum(parameter.requires_grad for parameter in module.parameters()) == 28


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoRA(attribute="network"), "attribute 'network'"),
        (LoRA(Adapters(targets=("nowhere",))), "layers.0.mixer.q"),
    ],
)
def test_what_cannot_work_is_refused(fit, lora, words):
    with pytest.raises(ConfigurationError, match=words):
        fit(pretraining(), lora=lora)


def test_other_checkpoints_are_refused(fit, tmp_path):
    from lightning.pytorch.callbacks import Callback

    fit(pretraining(), 1, lora=Callback())
    with pytest.raises(CheckpointError, match="load_model reads checkpoints without adapters"):
        load_merged(tmp_path / "checkpoints" / "step=1.ckpt")


def tied_transformers():
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.GraniteConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    return TransformersModel(transformers.GraniteForCausalLM(config))


@pytest.mark.parametrize("make", [dataclasses.replace(CONFIG, tie_embeddings=True).build, tied_transformers])
@pytest.mark.parametrize(
    "names",
    [{"targets": ("head",)}, {"targets": ("embed",)}, {"targets": ("q",), "trained": ("head",)}],
    ids=["adapted head", "adapted embedding", "whole head"],
)
def test_a_tied_layer_that_is_trained_apart_is_merged_apart(tmp_path, make, names):
    torch.manual_seed(0)
    model = make().eval()
    if not isinstance(model, Transformer):
        theirs = {"head": "lm_head", "embed": "embed_tokens", "q": "q_proj"}
        names = {argument: tuple(map(theirs.get, chosen)) for argument, chosen in names.items()}
    with torch.no_grad():
        before = model(probe())
        Adapters(rank=2, **names).attach(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
        trained = model(probe())
        assert not torch.allclose(trained, before, atol=1e-2)
        export_model(model, tmp_path / "out")
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        for again in (merge_adapters(model), exported, load_pretrained(tmp_path / "out")):
            logits = again.eval()(probe())
            torch.testing.assert_close(getattr(logits, "logits", logits), trained, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(remove_adapters(model)(probe()), before)


PEFT = {
    "pattern": {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "modules_to_save": ["norm"]},
    "head": {"target_modules": ["o_proj", "lm_head"], "use_dora": False},
    "whole head": {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "use_rslora": True},
}


def of_peft(kind):
    """A model of transformers in a PeftModel, as people make it; the same each time."""
    import peft

    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = transformers.GraniteConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, logits_scaling=2.0)
    config.tie_word_embeddings = False
    base = transformers.GraniteForCausalLM(config)
    settings = peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **PEFT[kind.removesuffix(", injected")])
    if kind.endswith("injected"):
        return peft.inject_adapter_in_model(settings, base)
    return peft.get_peft_model(base, settings)


@pytest.mark.parametrize("kind", [*PEFT, "one layer, injected"])
def test_a_model_of_peft_trains_resumes_opens_and_is_exported(tmp_path, kind):
    """Oracle: the user's own PeftModel, whose weights are trained."""

    def fit_peft(steps, folder, resume=None):
        given = of_peft(kind)
        module = PretrainModule(given, optimizer=AdamW(lr=1e-2), schedule=Constant())
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, callbacks=[saver], enable_progress_bar=False
        )
        trainer.fit(module, rows(), ckpt_path=resume)
        return given.eval(), module

    given, module = fit_peft(4, "whole")
    checkpoint = tmp_path / "whole" / "step=4.ckpt"
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    fresh = of_peft(kind).state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in given.state_dict().items())
    with torch.no_grad():
        expected = given(probe()).logits
        for model in (load_merged(checkpoint)[0], PretrainModule.load_from_checkpoint(checkpoint).model.eval()):
            torch.testing.assert_close(model(probe()), expected)
        export_model(module.model, tmp_path / "exported")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
        torch.testing.assert_close(theirs(probe()).logits, expected)
    resumed, _ = fit_peft(4, "rest", tmp_path / "whole" / "step=2.ckpt")
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, given.state_dict()[name]), name


def test_adapters_that_a_model_has_already_are_those_of_the_callback_or_refused():
    import peft

    def fit_with(model, **settings):
        trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, callbacks=[LoRA(Adapters(**settings))])
        module = model if isinstance(model, PretrainModule) else PretrainModule(model, optimizer=AdamW())
        trainer.callbacks[0].setup(trainer, module, "fit")
        return module

    for settings, named in [
        ({"rank": 8, "alpha": 3.0, "targets": ("o_proj", "lm_head")}, "rank=2"),
        ({"rank": 2, "alpha": 3.0}, r"targets=\('lm_head', 'o_proj'\)"),
        ({"rank": 2, "alpha": 3.0, "targets": ("o_proj", "lm_head"), "trained": ("norm",)}, r"trained=\(\)"),
    ]:
        with pytest.raises(ConfigurationError, match=f"{named}.*remove LoRA from the callbacks"):
            fit_with(of_peft("head"), **settings)
    fit_with(of_peft("head"), rank=2, alpha=3.0, targets=("o_proj", "lm_head"))
    scales = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    other = peft.get_peft_model(of_peft("head").merge_and_unload(), scales)
    several = of_peft("head")
    several.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (other, several):
        with pytest.raises(ConfigurationError, match="remove LoRA from the callbacks"):
            fit_with(model)
    again = fit_with(of_peft("head").merge_and_unload(), rank=2)
    fit_with(again, rank=2)  # a second run of the same module
    with pytest.raises(ConfigurationError, match="with rank=2, alpha=32"):
        fit_with(again, rank=4, alpha=8.0)
