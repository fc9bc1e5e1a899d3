"""KTO against TRL's trainer and a float64 computation, and its gradient however a step is cut."""

import collections
import functools
import types

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from recorded_gradients import Record
from torch import nn
from torch.nn import functional as F
from trl.trainer.kto_trainer import KTOTrainer

from lightning_lm.data import Examples, PairRows, Plain
from lightning_lm.data.post_training.unpaired import UnpairedExamples, UnpairedStream, unpaired
from lightning_lm.datamodules import Loading, UnpairedDataModule
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.functional import KTO
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import KTOModule
from lightning_lm.optim import Constant
from lightning_lm.tokenizers import CharacterTokenizer

DIGITS = CharacterTokenizer("0123456789=")
LOSS = KTO(beta=0.7, desirable_weight=1.3, undesirable_weight=0.6)


def records(count=16):
    noise = np.random.default_rng(0)

    def text(longest):
        return "".join(map(str, noise.integers(0, 10, noise.integers(1, longest + 1))))

    return [{"prompt": text(3) + "=", "completion": text(5), "label": bool(noise.integers(2))} for _ in range(count)]


def small(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (
        TransformerConfig(vocab_size=DIGITS.vocab_size, d_model=16, num_layers=1, context_length=32).build().to(dtype)
    )


def moved(dtype=torch.float32):
    """A policy that is no longer its reference, so that the KL estimate is not 0."""
    model = small(dtype)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), small(dtype, seed=6).parameters(), strict=True):
            parameter.lerp_(other, 0.5)
    return model


def answer_logprob(model, row, label):
    kept = label != -100
    logp = model(row[None])[0].log_softmax(-1)
    return logp[:-1].gather(1, row[1:, None])[kept[1:], 0].sum()


class Scored(nn.Module):
    is_gradient_checkpointing = False

    """A model as TRL calls it: log-probabilities of the labels in place of logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, **_):
        logp = self.model(input_ids)[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
        zeros = torch.zeros_like(logp)
        return types.SimpleNamespace(
            log_probs=torch.where(labels[:, 1:] != -100, logp, 0), entropy=zeros, mean_logits=zeros
        )


def trl_loss(batch, model, reference):
    """Loss and KL estimate as KTOTrainer computes them, without its trainer."""
    accelerator = types.SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)
    trainer = types.SimpleNamespace(
        accelerator=accelerator,
        model=Scored(model),
        ref_model=Scored(reference),
        precompute_ref_logps=False,
        calculate_KL=True,
        aux_loss_enabled=False,
        beta=LOSS.beta,
        loss_type="kto",
        desirable_weight=LOSS.desirable_weight,
        undesirable_weight=LOSS.undesirable_weight,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    trainer._compute_kl_logps = functools.partial(KTOTrainer._compute_kl_logps, trainer)
    inputs = {"label": batch["desirable"]}
    for theirs, ours in (("", ""), ("KL_", "mismatched_")):
        inputs[f"{theirs}input_ids"] = batch[f"{ours}input_ids"]
        inputs[f"{theirs}attention_mask"] = torch.ones_like(batch[f"{ours}input_ids"])
        inputs[f"{theirs}completion_mask"] = (batch[f"{ours}labels"] != -100).long()
    loss = KTOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)
    return loss, trainer._metrics["train"]["kl"][0]


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_loss_of_a_completion(scale):
    """Equation 7 as TRL writes it, in float64; extremes saturate without NaN."""
    torch.manual_seed(0)
    logratios = (scale * torch.randn(9, dtype=torch.float64)).requires_grad_()
    desirable, kl = torch.arange(9) % 3 == 0, torch.tensor(0.4, dtype=torch.float64)
    found = LOSS(logratios, desirable, kl)
    chosen = LOSS.desirable_weight * (1 - F.sigmoid(LOSS.beta * (logratios[desirable] - kl)))
    rejected = LOSS.undesirable_weight * (1 - F.sigmoid(LOSS.beta * (kl - logratios[~desirable])))
    torch.testing.assert_close(found[desirable], chosen)
    torch.testing.assert_close(found[~desirable], rejected)
    wanted = torch.autograd.grad(chosen.sum() + rejected.sum(), logratios, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(found.sum(), logratios)[0], wanted)
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        with pytest.raises(ConfigurationError, match=name):
            KTO(**{name: 0.0})


def step_of(data):
    """All rows of a step and its mismatched rows, as tensors."""
    stream = UnpairedStream(
        UnpairedExamples(Examples(source=data), DIGITS, Plain(), PairRows()), shuffle=False, step_size=len(data)
    )
    places = np.arange(len(data))
    return {name: torch.from_numpy(value) for name, value in (stream.batch(places) | stream.step_batch(places)).items()}


def test_mismatched_rows_are_those_of_trl():
    """TRL rotates the completions of a batch by one: the first prompt gets the last completion."""
    data = records(5)
    batch = step_of(data)
    completions = [[*DIGITS.encode(record["completion"]), DIGITS.eos_id] for record in data]
    rotated = [completions[-1], *completions[:-1]]
    for row, (record, completion) in enumerate(zip(data, rotated, strict=True)):
        prompt = [DIGITS.eos_id, *DIGITS.encode(record["prompt"])]
        labels = batch["mismatched_labels"][row]
        assert labels[labels != -100].tolist() == completion
        assert batch["mismatched_input_ids"][row, : len(prompt) + len(completion)].tolist() == prompt + completion


def exact(batch):
    """Loss, KL estimate and gradient of a step in float64 from all logits, row by row."""
    model, reference = moved(torch.float64), small(torch.float64)

    def logratios(prefix):
        rows = list(zip(batch[f"{prefix}input_ids"], batch[f"{prefix}labels"], strict=True))
        policy = torch.stack([answer_logprob(model, *row) for row in rows])
        return policy - torch.stack([answer_logprob(reference, *row) for row in rows]).detach()

    kl = logratios("mismatched_").mean().detach().clamp(min=0)
    ratios, desirable = logratios(""), batch["desirable"]
    chosen = LOSS.desirable_weight * (1 - F.sigmoid(LOSS.beta * (ratios[desirable] - kl)))
    rejected = LOSS.undesirable_weight * (1 - F.sigmoid(LOSS.beta * (kl - ratios[~desirable])))
    loss = torch.cat([chosen, rejected]).mean()
    loss.backward()
    return loss.item(), kl.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_trl_computes_the_same():
    batch = step_of(records())
    loss, kl, gradients = exact(batch)
    model = moved(torch.float64)
    theirs, their_kl = trl_loss(batch, model, small(torch.float64))
    theirs.backward()
    assert (loss, kl) == (pytest.approx(theirs.item(), rel=1e-9), pytest.approx(their_kl, rel=1e-9))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


class Writer(KTOModule):
    """Starts away from its reference, and leaves the gradients it saw in a file, for ranks in other processes."""

    folder = None

    def configure_model(self):
        if self.reference is None:
            super().configure_model()
            self.model.load_state_dict(moved().state_dict())

    def on_fit_end(self):
        torch.save(
            (self.trainer.optimizers[0].children[0].seen, dict(self.last_metrics)),
            self.folder / f"{self.global_rank}.pt",
        )


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_cut(devices, accumulate, tmp_path):
    data = UnpairedDataModule(records(), tokenizer=DIGITS, batch_size=16, loading=Loading(cache_dir=str(tmp_path)))
    module = Writer(small(), loss=LOSS, optimizer=Record(), schedule=Constant())
    module.folder = tmp_path
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if devices > 1 else "auto"
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        barebones=False,
    )
    trainer.fit(module, datamodule=data)
    ordered = UnpairedStream(
        UnpairedExamples(Examples(source=records()), DIGITS, Plain(), PairRows()), seed=0, step_size=16
    )
    places = np.arange(16)
    rows = ordered.batch(places) | ordered.step_batch(places)
    loss, kl, wanted = exact({name: torch.from_numpy(value) for name, value in rows.items()})
    assert kl > 0.01
    for rank in range(devices):
        (found,), metrics = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        distance = sum((found[name].double() - wanted[name]).square().sum() for name in wanted).sqrt()
        assert distance / sum(value.square().sum() for value in wanted.values()).sqrt() < 1e-5
        assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["train/kl"] == pytest.approx(kl, rel=1e-4)


def test_preferences_are_unpaired_and_labels_read():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert unpaired(pair) == [("q", "a", True), ("q", "b", False)]
    assert unpaired({"prompt": "q", "completion": "a", "label": 0}) == [("q", "a", False)]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert unpaired({"conversations": turns, "kto_tag": True}) == [
        ([{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}], True)
    ]
    with pytest.raises(DataError, match="label is 'good'; true or false"):
        unpaired({"prompt": "q", "completion": "a", "label": "good"})
    with pytest.raises(DataError, match=r"prompt \+ completion \+ label"):
        unpaired({"prompt": "q", "completion": "a"})
    with pytest.raises(DataError, match="1 are desirable"):
        UnpairedExamples(
            Examples(source=[{"prompt": "1", "completion": "2", "label": True}]), DIGITS, Plain(), PairRows()
        )
    with pytest.raises(ConfigurationError, match="at least 2"):
        UnpairedDataModule([], batch_size=1)
    module = KTOModule(small())
    module.configure_model()
    alone = {name: value for name, value in step_of(records(4)).items() if "mismatched" not in name}
    with pytest.raises(ConfigurationError, match="UnpairedDataModule"):
        module.training_loss(alone)
