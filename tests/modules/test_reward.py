"""Reward models: Bradley-Terry against a float64 computation, read at the last real token, used as a reward."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from pairs_in_pieces import Pieces, part_of
from recorded_gradients import Record
from torch.nn import functional as F

from lightning_lm.data import EncodedPair, PairStream, Plain, PreferencePairs, ReverseDigits, encode_pair
from lightning_lm.datamodules import Loading, PreferenceDataModule
from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import (
    BradleyTerry,
    LearnedReward,
    PretrainModule,
    RewardModel,
    RewardModule,
    load_reward_model,
)
from lightning_lm.optim import AdamW, Constant
from lightning_lm.protocols import RewardFunction
from lightning_lm.rewards import score
from lightning_lm.tokenizers import CharacterTokenizer
from lightning_lm.types import IGNORE_INDEX

VOCAB = 31
PAIRS, WINDOW = 20, 16
TOLERANCE = 1e-6
DIGITS = CharacterTokenizer("0123456789=")


def whole_batch(count=PAIRS, *, empty=()) -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(0)

    def ids(longest):
        return draw.integers(VOCAB, size=draw.integers(1, longest + 1)).tolist()

    pairs = PreferencePairs(EncodedPair(ids(3), ids(5), ids(5), draw.random(), False) for _ in range(count))
    batch = PairStream(pairs, shuffle=False).batch(np.arange(count))
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    for pair in empty:
        tensors["labels"][[pair, pair + count]] = IGNORE_INDEX
    return tensors


def built(config) -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(config.build())


def naive_rewards(model, batch):
    """One row at a time, without padding, from all features of the backbone."""
    rewards = []
    for row, length in zip(batch["input_ids"], batch["lengths"].tolist(), strict=True):
        features = model.backbone.hidden(row[None, :length])[0, -1]
        rewards.append((features.double() * model.score.weight[0].double()).sum())
    return torch.stack(rewards)


def exact(config, batch, *, use_margin=True, center=0.0):
    model = built(config).double()
    chosen, rejected = naive_rewards(model, batch).chunk(2)
    margin = batch["margin"].double() if use_margin else 0.0
    losses = torch.log1p(torch.exp(-(chosen - rejected - margin))) + center * (chosen + rejected) ** 2
    kept = (batch["labels"] != IGNORE_INDEX).any(1)[: len(chosen)]
    loss = losses[kept].sum() / max(1, int(kept.sum()))
    loss.backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    return gradients, loss.item()


def distance(found, wanted) -> float:
    difference = sum((found[name].double() - wanted[name]).square().sum() for name in wanted)
    return (difference / sum(value.square().sum() for value in wanted.values())).sqrt().item()


@pytest.fixture
def fit(make_trainer):
    def run(module, batch, *, size=WINDOW, **settings):
        trainer = make_trainer(**{"max_epochs": 1, "log_every_n_steps": 1, **settings})
        trainer.fit(module, Pieces(batch, size, trainer))
        return trainer

    return run


# --- loss and gradient ---


@pytest.mark.parametrize(("use_margin", "center"), [(True, 0.0), (False, 0.0), (True, 0.3)])
def test_loss_gradient_and_numbers_are_those_of_a_textbook(config, fit, use_margin, center):
    batch = whole_batch(16, empty=[3])
    loss = BradleyTerry(use_margin=use_margin, center_coefficient=center)
    module = RewardModule(built(config), loss=loss, optimizer=Record())
    trainer = fit(module, batch, size=4, accumulate_grad_batches=4)
    wanted, value = exact(config, batch, use_margin=use_margin, center=center)
    (found,) = trainer.optimizers[0].children[0].seen
    assert found.keys() == wanted.keys()
    assert distance(found, wanted) < TOLERANCE
    kept = [pair for pair in range(16) if pair != 3]
    with torch.no_grad():
        chosen, rejected = (side[kept] for side in naive_rewards(built(config), batch).chunk(2))
    both = torch.cat([chosen, rejected])
    expected = {
        "loss": value,
        "accuracy": (chosen > rejected).double().mean().item(),
        "margin": (chosen - rejected).mean().item(),
        "mean_reward": both.mean().item(),
        "min_reward": both.min().item(),
        "max_reward": both.max().item(),
    }
    for name, number in expected.items():
        assert module.last_metrics[f"train/{name}"] == pytest.approx(number, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("accumulate", [1, 4, 16])
def test_micro_batches_do_not_change_the_gradient(config, fit, accumulate):
    batch = whole_batch(empty=range(4, 8))
    module = RewardModule(built(config), optimizer=Record())
    trainer = fit(module, batch, size=WINDOW // accumulate, accumulate_grad_batches=accumulate)
    seen = trainer.optimizers[0].children[0].seen
    assert len(seen) == 2
    for found, part in zip(seen, (slice(WINDOW), slice(WINDOW, PAIRS)), strict=True):
        assert distance(found, exact(config, part_of(batch, part))[0]) < TOLERANCE


class Writer(RewardModule):
    """Leaves what its rank saw in a file, since the ranks of a test are other processes."""

    folder = None

    def on_fit_end(self):
        torch.save(self.trainer.optimizers[0].children[0].seen, self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize("tied", [False, True])
def test_processes_do_not_change_the_gradient(config, fit, tmp_path, tied):
    """Also where the output layer, which nothing uses, is the embedding itself."""
    config = dataclasses.replace(config, tie_embeddings=tied)
    batch = whole_batch(empty=range(1, WINDOW, 2))  # the second rank has nothing to learn in the first window
    module = Writer(built(config), optimizer=Record())
    module.folder = tmp_path
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    fit(module, batch, size=4, accumulate_grad_batches=2, devices=2, strategy=strategy)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for found, part in zip(seen, (slice(WINDOW), slice(WINDOW, PAIRS)), strict=True):
            found = {name.removeprefix("module."): value for name, value in found.items()}
            assert distance(found, exact(config, part_of(batch, part))[0]) < TOLERANCE


# --- the last token ---


@pytest.mark.parametrize("fill", [0, VOCAB - 1])
def test_the_reward_is_read_at_the_last_real_token(config, fill):
    """The last real id may be that of the padding: an answer's end of sequence, where both are one."""
    model, batch = built(config), whole_batch(8)
    batch["input_ids"][torch.arange(16), batch["lengths"] - 1] = fill
    expected = naive_rewards(model, batch)
    wide = F.pad(batch["input_ids"], (0, 7), value=fill)
    wide[torch.arange(wide.shape[1]) >= batch["lengths"][:, None]] = fill
    found = model(wide, batch["lengths"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_last_product_is_in_float32_under_autocast(config):
    model, batch = built(config), whole_batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.backbone.hidden(batch["input_ids"])
        found = model(batch["input_ids"], batch["lengths"])
    last = hidden[torch.arange(8), batch["lengths"] - 1].double()
    torch.testing.assert_close(found.double(), (last * model.score.weight.double()).sum(-1), rtol=1e-5, atol=1e-6)


def test_models_of_transformers_become_backbones(fit):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    module = RewardModule(LlamaForCausalLM(settings), optimizer=AdamW(lr=1e-2), schedule=Constant())
    batch = whole_batch(8)
    fit(module, batch, size=8, max_epochs=10)
    assert module.last_metrics["train/loss"] < math.log(2)
    model = module.model.eval()
    with torch.no_grad():
        found = model(batch["input_ids"], batch["lengths"])
        torch.testing.assert_close(found.double(), naive_rewards(model, batch), rtol=1e-4, atol=1e-5)


def test_other_modules_are_refused():
    with pytest.raises(ConfigurationError, match="causal language model"):
        RewardModel(torch.nn.Linear(2, 2))


# --- a run, and its use ---

CONFIG = TransformerConfig(d_model=16, num_layers=1, layers=Layer(mixer=Attention(num_heads=2)), context_length=16)


def digit_pairs() -> PreferenceDataModule:
    return PreferenceDataModule(
        ReverseDigits(num_examples=40, rejected="corrupted"),
        ReverseDigits(num_examples=7, rejected="corrupted", held_out=True),
        tokenizer=DIGITS,
        batch_size=4,
        loading=Loading(show_progress=False),
    )


@pytest.fixture
def train(make_trainer, tmp_path):
    def run(folder, kind=RewardModule, *, resume=None, data=None, **settings):
        torch.manual_seed(0)
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(max_steps=4, callbacks=[saver], enable_checkpointing=True)
        module = kind(CONFIG, optimizer=AdamW(lr=1e-2), schedule=Constant(), **settings)
        trainer.fit(module, datamodule=data or digit_pairs(), ckpt_path=resume)
        return module, tmp_path / folder / "step=4.ckpt"

    return run


def test_resumes_bit_for_bit(train, tmp_path):
    whole, _ = train("whole")
    resumed, _ = train("rest", resume=tmp_path / "whole" / "step=2.ckpt")
    first, second = whole.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_becomes_a_reward(train):
    module, path = train("run")
    model, tokenizer = load_reward_model(path)
    assert not model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in module.model.state_dict().items())
    samples = {"prompts": ["123=", "45="], "completions": ["321", "5"]}
    pairs = [encode_pair(*sample, DIGITS, Plain()) for sample in zip(*samples.values(), strict=True)]
    rows = [[*prompt, *answer] for prompt, answer, _ in pairs]
    with torch.no_grad():
        expected = [model(torch.tensor([row]), torch.tensor([len(row)])).item() for row in rows]
    reward = model.as_reward(tokenizer, batch_size=1)
    assert isinstance(reward, RewardFunction)
    for found in (
        reward(**samples, answer=["a", "b"]),
        LearnedReward(checkpoint=str(path))(**samples, completion_ids=[[1], [2]]),
    ):
        assert found == pytest.approx(expected, rel=1e-5)
    table = score([reward], [1.0], **samples)
    assert table.names == ("reward_model",)
    assert table.totals == pytest.approx(expected, rel=1e-5)


def test_a_reward_leaves_the_model_in_its_mode(train):
    module, _ = train("run")
    model = module.model.train()
    assert model.as_reward(DIGITS)(prompts=["1="], completions=["1"])
    assert model.training


def test_checkpoints_of_other_modules_are_refused(train, make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.fit(PretrainModule(CONFIG), datamodule=digit_pairs())
    trainer.save_checkpoint(tmp_path / "other.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match="load_model reads the language model"):
        load_reward_model(tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError):
        load_reward_model(tmp_path / "absent.ckpt")
