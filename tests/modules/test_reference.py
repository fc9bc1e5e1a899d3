"""References of every kind say the same before training, and keep saying it."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_lm.callbacks import Adapters, LoRA
from lightning_lm.data import ReverseDigits
from lightning_lm.datamodules import Loading, PreferenceDataModule
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.preference import SimPO
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import (
    AdapterReference,
    CopyReference,
    DPOModule,
    FrozenCopy,
    PrecomputedReference,
    SlowSync,
    adapters_off,
)
from lightning_lm.optim import AdamW, Constant
from lightning_lm.tokenizers import CharacterTokenizer

CONFIG = TransformerConfig(d_model=16, num_layers=2, layers=Layer(mixer=Attention(num_heads=2)), context_length=16)


def pairs(count=12, *, validation=3, **settings) -> PreferenceDataModule:
    return PreferenceDataModule(
        ReverseDigits(num_examples=count),
        ReverseDigits(num_examples=validation, held_out=True) if validation else None,
        tokenizer=CharacterTokenizer("0123456789="),
        batch_size=4,
        loading=Loading(show_progress=False),
        **settings,
    )


def policy_of(reference, kind=DPOModule, **settings) -> DPOModule:
    torch.manual_seed(0)
    return kind(CONFIG, reference=reference, optimizer=AdamW(lr=1e-2), schedule=Constant(), **settings)


@pytest.fixture
def fit(make_trainer):
    def run(module, data=None, *, resume=None, **settings):
        trainer = make_trainer(**{"max_steps": 5, "log_every_n_steps": 1, **settings})
        trainer.fit(module, datamodule=data or pairs(), ckpt_path=resume)
        return module

    return run


def same(first, second, *, rtol=0.0) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=rtol, atol=rtol / 10) for name in first
    )


# --- a copy ---


def test_a_copy_is_frozen_and_stays_in_evaluation_mode():
    torch.manual_seed(0)
    model = TransformerConfig(vocab_size=9, d_model=8, num_layers=1, layers=Layer(mixer=Attention(num_heads=2))).build()
    copy = FrozenCopy(model.train())
    copy.train()
    assert not any(module.training for module in copy.modules())
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    assert not torch.equal(model.embed.weight, copy.model.embed.weight)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_slow_sync_moves_a_share_of_the_way_at_its_steps(alpha):
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=9, d_model=8, num_layers=1, layers=Layer(mixer=Attention(num_heads=2)))
    model, old = config.build(), config.build()
    copy = FrozenCopy(old, SlowSync(alpha=alpha, every=3))
    expected = {name: value.clone() for name, value in old.state_dict().items()}
    for step in (1, 2, 3, 4, 5, 6):
        copy.follow(model, step)
        if step % 3 == 0:
            target = model.state_dict()
            expected = {name: (1 - alpha) * value + alpha * target[name] for name, value in expected.items()}
        found = copy.model.state_dict()
        assert all(torch.allclose(found[name], value, atol=1e-7) for name, value in expected.items())


def test_the_copy_follows_at_optimizer_steps_not_at_micro_batches(fit):
    module = fit(policy_of(CopyReference(sync=SlowSync(alpha=1.0, every=2))), max_steps=3, accumulate_grad_batches=2)
    at_two = fit(policy_of(CopyReference()), max_steps=2, accumulate_grad_batches=2)
    assert same(module.reference.model.state_dict(), at_two.model.state_dict())


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.5}, {"every": 0}])
def test_slow_sync_out_of_range_is_refused(settings):
    with pytest.raises(ConfigurationError, match="above 0 and at most 1"):
        SlowSync(**settings)


def test_a_loss_without_reference_builds_none(fit):
    module = fit(policy_of(CopyReference(), loss=SimPO()), max_steps=1)
    assert module.reference is None
    assert not any(name.startswith("reference") for name in module.state_dict())


# --- computed before ---


def test_precomputed_trains_like_a_copy(fit, tmp_path):
    live = fit(policy_of(CopyReference()))
    computed = fit(policy_of(PrecomputedReference(cache_dir=str(tmp_path))))
    assert same(live.model.state_dict(), computed.model.state_dict(), rtol=1e-4)
    for name, value in live.last_metrics.items():
        assert computed.last_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert {"val/loss", "train/loss"} <= live.last_metrics.keys()


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_cache_is_computed_again_and_said(fit, tmp_path, how):
    first = fit(policy_of(PrecomputedReference(cache_dir=str(tmp_path))), max_steps=1).reference.table
    (file,) = tmp_path.iterdir()
    whole = bytearray(file.read_bytes())
    place = whole.index(first.numpy().tobytes()[:16])
    whole[place + 3] ^= 0x10
    file.write_bytes(whole if how == "flipped" else whole[: place + 8])
    with pytest.warns(UserWarning, match="computed again"):
        second = fit(policy_of(PrecomputedReference(cache_dir=str(tmp_path))), max_steps=1).reference.table
    assert torch.equal(first, second)
    assert torch.equal(torch.load(file), first)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_precomputed_equals_live_pair_by_pair(fit, tmp_path):
    data = pairs()
    module = fit(policy_of(PrecomputedReference(cache_dir=str(tmp_path))), data, max_steps=1)
    torch.manual_seed(0)
    begin = CONFIG.build(data.tokenizer.vocab_size)
    table = module.reference.table
    assert table.shape == (15, 2)
    for first, side in ((0, data.train_pairs), (12, data.validation_pairs)):
        for number in range(len(side)):
            prompt, *answers = side[number]
            for column, answer in enumerate(answers):
                ids = torch.from_numpy(np.concatenate([prompt, answer]))
                logp = begin(ids[None]).log_softmax(-1)[0].double()
                expected = sum(logp[place - 1, ids[place]] for place in range(len(prompt), len(ids)))
                assert table[first + number, column].item() == pytest.approx(expected.item(), rel=1e-5)


class Counting(DPOModule):
    """Notes how often pairs are computed before training."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.computed = []

    def _prepare_reference(self):
        compute = self.reference._computed
        self.reference._computed = lambda *given: self.computed.append(1) or compute(*given)
        super()._prepare_reference()


def test_the_cache_is_used_for_the_same_weights_and_pairs_only(fit, tmp_path):
    def computed(data=None, seed=0):
        torch.manual_seed(seed)
        module = Counting(CONFIG, reference=PrecomputedReference(cache_dir=str(tmp_path)))
        torch.manual_seed(seed)
        return bool(fit(module, data, max_steps=1).computed)

    assert computed()
    assert not computed()
    assert computed(seed=1)
    assert computed(pairs(13))
    assert computed(pairs(validation=4))
    assert not computed(seed=1)
    assert not list(tmp_path.glob("tmp*"))


def test_precomputed_resumes_bit_for_bit_without_its_cache(fit, tmp_path):
    """The table is in the checkpoint: the weights it came from are gone by then."""

    def run(folder, resume=None):
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = policy_of(PrecomputedReference(cache_dir=str(tmp_path / folder / "cache")))
        return fit(module, callbacks=[saver], enable_checkpointing=True, resume=resume)

    whole = run("whole")
    resumed = run("rest", tmp_path / "whole" / "step=2.ckpt")
    assert not (tmp_path / "rest" / "cache").exists()
    assert same(whole.state_dict(), resumed.state_dict())


class Keeping(DPOModule):
    """Leaves its table in a file, since the ranks of a test are other processes."""

    folder = None

    def on_fit_end(self):
        torch.save(self.reference.table, self.folder / f"{self.global_rank}.pt")


def test_two_processes_compute_the_same_table(fit, tmp_path):
    alone = fit(policy_of(PrecomputedReference(cache_dir=str(tmp_path / "1"))), pairs(13), max_steps=1)
    module = policy_of(PrecomputedReference(cache_dir=str(tmp_path / "2")), Keeping)
    module.folder = tmp_path
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    fit(module, pairs(13), max_steps=1, devices=2, strategy=strategy)
    for rank in range(2):
        table = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(table, alone.reference.table, rtol=1e-5, atol=1e-5)


def test_validation_alone_computes_what_it_needs(make_trainer, tmp_path):
    module = policy_of(PrecomputedReference(cache_dir=str(tmp_path)))
    make_trainer().validate(module, datamodule=pairs(), verbose=False)
    assert module.last_metrics["val/loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_pairs_without_numbers_are_refused(fit, tmp_path):
    with pytest.raises(ConfigurationError, match="PreferenceDataModule"):
        fit(DPOModule(CONFIG.build(13), reference=PrecomputedReference()), LightningDataModule())


# --- adapters ---


def test_adapters_off_is_the_model_before_training(fit):
    """At the first step both say the very same; afterwards the reference still says what it said."""
    module = policy_of(AdapterReference())
    fit(module, max_steps=1, callbacks=[LoRA(Adapters(rank=2))])
    assert module.last_metrics["train/loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert module.last_metrics["train/rewards/margins"] == 0.0
    copied = fit(policy_of(CopyReference()), max_steps=4, callbacks=[LoRA(Adapters(rank=2))])
    module = fit(policy_of(AdapterReference()), max_steps=4, callbacks=[LoRA(Adapters(rank=2))])
    assert not list(module.reference.parameters())
    assert same(module.model.state_dict(), copied.model.state_dict())
    assert module.last_metrics["val/loss"] == copied.last_metrics["val/loss"]


def test_a_model_without_adapters_is_refused(fit):
    with pytest.raises(ConfigurationError, match="no adapters to switch off"):
        fit(policy_of(AdapterReference()))


def test_adapters_that_were_off_stay_off():
    torch.manual_seed(0)
    model = CONFIG.build(13)
    Adapters(rank=2).attach(model)
    layer = model.layers[0].mixer.q
    layer.enable_adapters(False)
    with adapters_off(model):
        assert all(part.disable_adapters for part in (layer, model.layers[1].mixer.q))
    assert layer.disable_adapters
    assert not model.layers[1].mixer.q.disable_adapters
