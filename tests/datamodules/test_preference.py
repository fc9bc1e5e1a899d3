"""Pairs reach the trainer once an epoch, in the same order however they are shared, and go on where they stopped."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lm.data import PairRows, ReverseDigits
from lightning_lm.datamodules import Loading, PreferenceDataModule
from lightning_lm.errors import ConfigurationError, DataError, FingerprintError
from lightning_lm.tokenizers import CharacterTokenizer, TrainCharacters

DIGITS = CharacterTokenizer("0123456789=")
PAIRS = 30


class Noting(LightningModule):
    """Notes the pairs of every optimizer step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = {}, []

    def training_step(self, batch, batch_idx):
        half = len(batch["pair_ids"])
        assert batch["input_ids"].shape[0] == batch["labels"].shape[0] == len(batch["lengths"]) == 2 * half
        self.seen.setdefault(self.trainer.global_step, []).extend(batch["pair_ids"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        real = (batch["labels"] != -100).any(1).view(2, -1)
        assert torch.equal(real[0], real[1])
        self.validated += batch["pair_ids"][real[0]].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(train=PAIRS, validation=None, *, batch_size=8, loading=Loading(show_progress=False), **settings):
    source = ReverseDigits(num_examples=train) if isinstance(train, int) else train
    return PreferenceDataModule(
        source, validation, **{"tokenizer": DIGITS, "batch_size": batch_size, "loading": loading, **settings}
    )


@pytest.fixture
def fit(tmp_path):
    def run(datamodule, steps, *, resume=None, folder="checkpoints", module=None, **settings):
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(
            **{
                "max_steps": steps,
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [saver],
                "num_sanity_val_steps": 0,
                **settings,
            }
        )
        module = module or Noting()
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume)
        return module

    return run


def test_an_epoch_shows_every_pair_and_the_order_is_that_of_the_seed(fit):
    first, again, other = (fit(data(seed=seed), 15, folder=name).seen for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    in_order = [number for step in sorted(first) for number in first[step]]
    assert len(in_order) == 120
    for epoch in range(4):
        assert sorted(in_order[epoch * PAIRS : (epoch + 1) * PAIRS]) == list(range(PAIRS))
    assert first == again
    assert first != other


@pytest.mark.parametrize("settings", [{}, {"rows": PairRows(steps_sorted=2)}])
@pytest.mark.parametrize(
    ("accumulate", "loading"),
    [(2, Loading(show_progress=False)), (8, Loading(show_progress=False)), (1, Loading(num_workers=1))],
)
def test_micro_batches_and_workers_change_no_step(fit, settings, accumulate, loading):
    whole = fit(data(**settings), 5, folder="a").seen
    cut = fit(data(loading=loading, **settings), 5, folder="b", accumulate_grad_batches=accumulate).seen
    assert whole == cut


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_run_goes_on_where_it_stopped(fit, tmp_path, stop, accumulate):
    """Also in other micro-batches than those of the run that wrote the checkpoint."""
    whole = fit(data(), 10, accumulate_grad_batches=2).seen
    path = tmp_path / "checkpoints" / f"step={stop}.ckpt"
    rest = fit(data(), 10, resume=path, folder="rest", accumulate_grad_batches=accumulate).seen
    assert rest == {step: pairs for step, pairs in whole.items() if step >= stop}


def test_other_pairs_are_refused_unless_accepted(fit, tmp_path):
    fit(data(), 2)
    path = tmp_path / "checkpoints" / "step=2.ckpt"
    with pytest.raises(FingerprintError, match="pairs was"):
        fit(data(31), 4, resume=path, folder="rest")
    with pytest.raises(FingerprintError, match="seed was 0, is 1"):
        fit(data(seed=1), 4, resume=path, folder="rest")
    accepting = Loading(show_progress=False, accept_changed_data=True)
    with pytest.warns(UserWarning, match="as asked"):
        assert fit(data(31, loading=accepting), 4, resume=path, folder="rest").seen.keys() == {2, 3}


@pytest.mark.parametrize("count", [1, 8, 13])
def test_validation_shows_every_pair_once(fit, count):
    """Batches are filled up with pairs that count nothing; numbers go on behind those for training."""
    module = fit(data(PAIRS, ReverseDigits(num_examples=count, held_out=True)), 1, val_check_interval=1)
    assert sorted(module.validated) == list(range(PAIRS, PAIRS + count))


def test_a_share_can_be_held_out():
    module = data(200, 0.1)
    module.setup()
    sides = [{tuple(pairs[n][0]) for n in range(len(pairs))} for pairs in (module.train_pairs, module.validation_pairs)]
    assert 5 < len(module.validation_pairs) < 40
    assert len(module.train_pairs) + len(module.validation_pairs) == 200
    assert not sides[0] & sides[1]


def test_every_pair_is_numbered_once():
    module = data(PAIRS, ReverseDigits(num_examples=5, held_out=True))
    module.setup()
    assert module.num_pairs == PAIRS + 5
    seen = [
        number
        for batch in module.numbered_pairs()
        for number, labels in zip(batch["pair_ids"].tolist(), batch["labels"], strict=False)
        if (labels != -100).any()
    ]
    assert sorted(seen) == list(range(PAIRS + 5))


def test_what_decides_the_ids_decides_the_key():
    keys = set()
    for settings in ({}, {"rows": PairRows(max_length=13)}, {"tokenizer": CharacterTokenizer("=0123456789")}):
        module = data(**settings)
        module.setup()
        keys.add(module.pairs_key)
    other = data(PAIRS, ReverseDigits(num_examples=5, held_out=True))
    other.setup()
    assert len(keys | {other.pairs_key}) == 4


def test_files_are_read_and_a_tokenizer_trained_on_them(tmp_path):
    records = [
        {"prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 0.5},
        {"chosen": "yes it is", "rejected": "yes or no"},
        {"prompt": "x", "chosen": "same", "rejected": "same"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    module = data(str(path), tokenizer=TrainCharacters(), loading=Loading(cache_dir=str(tmp_path)))
    with pytest.warns(UserWarning, match="Of 3 pairs 1 with equal completions"):
        module.setup()
    prompt, chosen, _ = module.train_pairs[1]
    assert module.tokenizer.decode(prompt) == "<|endoftext|>yes"
    assert module.tokenizer.decode(chosen) == " it is<|endoftext|>"
    assert module.train_pairs.margins.tolist() == [0.5, 0.0]


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="batch_size must be at least 1"):
        data(batch_size=0)
    with pytest.raises(ConfigurationError, match="batch_size=8"):
        Trainer(accumulate_grad_batches=3, accelerator="cpu", logger=False, max_steps=1).fit(
            Noting(), datamodule=data()
        )
    with pytest.raises(DataError, match="Record 0"):
        data([{"prompt": "a", "completion": "b"}]).setup()
