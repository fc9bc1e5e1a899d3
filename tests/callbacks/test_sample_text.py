"""Samples appear when they should, are what the model says, and change nothing."""

import contextlib
import io
import warnings

import pytest
import rich
import torch
from rich.console import Console
from torch import nn

from lightning_lm.callbacks import SampleText
from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Sampling
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import PretrainModule


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return console


@pytest.fixture
def alphabet(foreign_module):
    class Alphabet(foreign_module):
        """After each letter comes the next, whatever is learned."""

        def forward(self, input_ids):
            following = nn.functional.one_hot((input_ids + 1) % 256, 256) * 100.0
            return super().forward(input_ids) * 0 + following

    return Alphabet


def fit(trainer, module, loader_of, batches_of, steps=6):
    loader = loader_of(batches_of([(2, 9)] * steps))
    trainer.fit(module, loader, loader_of(batches_of([(2, 9)])))


def steps_of(record):
    return sorted({step for _, _, step in record.texts})


def test_the_text_is_the_models_and_goes_to_console_and_logger(
    alphabet, loader_of, batches_of, trainer_with, record_of, tokenizer, console
):
    record = record_of()
    samples = SampleText(["ab", "x"], max_new_tokens=4, tokenizer=tokenizer)
    trainer = trainer_with(samples, logger=record, max_epochs=1, val_check_interval=2)
    fit(trainer, alphabet(), loader_of, batches_of)
    assert steps_of(record) == [2, 4, 6]  # once at the end, though validation and end fall together
    assert record.texts[:2] == [("samples/0", "    abcdef", 2), ("samples/1", "    xyz{|", 2)]
    assert console.file.getvalue().splitlines()[:2] == ["sample at step 2: [ab]cdef", "sample at step 2: [x]yz{|"]


def test_every_n_steps_and_at_the_end(alphabet, loader_of, batches_of, trainer_with, record_of, tokenizer, console):
    record = record_of()
    samples = SampleText(["a"], every_n_steps=4, max_new_tokens=1, tokenizer=tokenizer)
    trainer = trainer_with(samples, logger=record, max_epochs=1, val_check_interval=3, accumulate_grad_batches=1)
    fit(trainer, alphabet(), loader_of, batches_of, steps=9)
    assert steps_of(record) == [4, 8, 9]


def test_accumulated_batches_do_not_sample_twice(
    alphabet, loader_of, batches_of, trainer_with, record_of, tokenizer, console
):
    record = record_of()
    samples = SampleText(["a"], every_n_steps=1, max_new_tokens=1, tokenizer=tokenizer)
    trainer = trainer_with(samples, logger=record, max_epochs=1, accumulate_grad_batches=3, limit_val_batches=0)
    fit(trainer, alphabet(), loader_of, batches_of)
    assert [step for _, _, step in record.texts] == [1, 2]


def test_training_is_bit_equal_with_and_without(
    foreign_module, loader_of, batches_of, trainer_with, tokenizer, console
):
    weights = []
    for callbacks in ([], [SampleText(["ab"], every_n_steps=1, max_new_tokens=3, tokenizer=tokenizer)]):
        module = foreign_module()
        torch.manual_seed(5)
        fit(trainer_with(*callbacks, max_epochs=1), module, loader_of, batches_of)
        weights.append(module.head.weight.detach())
        assert module.dropout.training
    assert torch.equal(*weights)


def test_without_a_seed_the_same_noise_is_used_each_time(
    foreign_module, loader_of, batches_of, trainer_with, record_of, tokenizer, console
):
    """At a learning rate of 0 all samples are alike."""

    class Frozen(foreign_module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    record = record_of()
    samples = SampleText(["a"], every_n_steps=2, sampling=Sampling(temperature=1.0), tokenizer=tokenizer)
    fit(trainer_with(samples, logger=record, max_epochs=1), Frozen(), loader_of, batches_of)
    assert len({text for _, text, _ in record.texts}) == 1
    assert len(record.texts) == 3


def test_a_strategy_may_gather_the_weights(alphabet, loader_of, batches_of, trainer_with, tokenizer, console):
    entered = []
    trainer = trainer_with(SampleText(["a"], max_new_tokens=1, tokenizer=tokenizer), max_epochs=1, limit_val_batches=0)

    @contextlib.contextmanager
    def generation_context(module):
        entered.append(module)
        yield

    trainer.strategy.generation_context = generation_context
    module = alphabet()
    fit(trainer, module, loader_of, batches_of)
    assert entered == [module]


def test_bytes_cannot_command_the_terminal(foreign_module, loader_of, batches_of, trainer_with, tokenizer, console):
    class Escapes(foreign_module):
        def forward(self, input_ids):
            return super().forward(input_ids) * 0 + nn.functional.one_hot(torch.tensor(27), 256) * 100.0

    samples = SampleText(["a"], max_new_tokens=2, tokenizer=tokenizer)
    fit(trainer_with(samples, max_epochs=1, limit_val_batches=0), Escapes(), loader_of, batches_of)
    assert console.file.getvalue() == "sample at step 6: [a]\ufffd\ufffd\n"


def test_no_tokenizer_is_refused_before_training(alphabet, loader_of, batches_of, trainer_with):
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        fit(trainer_with(SampleText(), max_epochs=1), alphabet(), loader_of, batches_of)
    with pytest.raises(ConfigurationError, match="every_n_steps=0"):
        SampleText(every_n_steps=0)


def test_samples_are_as_long_as_the_context_leaves(loader_of, batches_of, trainer_with, record_of, tokenizer, console):
    """Without a length of its own a sample asks for no position that the model was not made for: nothing is warned."""
    config = TransformerConfig(vocab_size=256, d_model=16, num_layers=1, context_length=16)
    record = record_of()
    trainer = trainer_with(SampleText(["abcd"], tokenizer=tokenizer), logger=record, max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*quality usually degrades")
        fit(trainer, PretrainModule(config), loader_of, batches_of, steps=1)
    assert len(tokenizer.encode(record.texts[0][1].strip())) <= 17
    again = trainer_with(SampleText(["abcd"], tokenizer=tokenizer, max_new_tokens=64), logger=record, max_epochs=1)
    with pytest.warns(match="quality usually degrades"):
        fit(again, PretrainModule(config), loader_of, batches_of, steps=1)
