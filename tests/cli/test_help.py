"""Help: a page a verb without torch, and the arguments of any class on two screens."""

import inspect
import subprocess
import sys

import pytest
from lightning.pytorch import Callback, LightningDataModule, Trainer

import lightning_lm.callbacks
from lightning_lm import datamodules, modules
from lightning_lm.cli import main
from lightning_lm.cli.class_help import class_help
from lightning_lm.cli.pages import DATA_MODULES, MODULES, trainer_page
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import LMModule
from lightning_lm.optim import Muon

SCREEN = 40
PAGES = """
import contextlib, io, sys
from lightning_lm.cli import _VERBS, main
for words in [["--help"], *([name, "--help"] for name in _VERBS)]:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main(words)
    assert "usage: lightning-lm" in text.getvalue(), words
print([name for name in ("torch", "lightning", "transformers") if name in sys.modules])
"""


def concrete(package, base):
    return {
        name
        for name in package.__all__
        if inspect.isclass(cls := getattr(package, name)) and issubclass(cls, base) and not inspect.isabstract(cls)
    }


def test_help_of_every_verb_loads_neither_torch_nor_lightning():
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "profile"])
def test_a_page_fits_on_a_screen(verb):
    lines = trainer_page(verb).splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) < 80


def test_the_page_names_the_modules_that_there_are():
    assert set(MODULES) == concrete(modules, LMModule) - {"PipelineModule"}  # its strategy makes it
    assert set(DATA_MODULES) == concrete(datamodules, LightningDataModule) - {"ResumableDataModule"}  # the base


@pytest.mark.parametrize(
    "cls",
    [
        *(getattr(modules, name) for name in MODULES),
        *(getattr(datamodules, name) for name in DATA_MODULES),
        *(getattr(lightning_lm.callbacks, name) for name in sorted(concrete(lightning_lm.callbacks, Callback))),
        TransformerConfig,
        Muon,
    ],
)
def test_help_of_a_class_fits_on_two_screens_and_says_something_of_every_argument(cls, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = class_help(cls, "key").splitlines()
    assert len(lines) <= 2 * SCREEN
    assert max(map(len, lines)) < 80
    flags = [index for index, line in enumerate(lines) if line.startswith("  --key.")]
    assert len(flags) == len(inspect.signature(cls).parameters)
    for index in flags:
        assert lines[index + 1].startswith("      "), lines[index]
    assert "torch.nn" not in "".join(lines)


def test_help_of_the_trainer_fits_on_two_screens(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = class_help(Trainer, "trainer", ours=False).splitlines()
    assert len(lines) <= 2 * SCREEN
    assert max(map(len, lines)) < 80
    assert sum(line.startswith("  --trainer.") for line in lines) == len(inspect.signature(Trainer).parameters)


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["--model.help", "GRPOModule"], ["GRPOModule", "--model.rewards [Reward|FUNCTION, ...]  (required)"]),
        (["--model.help=GRPOModule"], ["--model.plan"]),
        (["--model", "GRPOModule", "--model.plan.help"], ["RolloutPlan:", "--model.plan.samples_per_prompt int"]),
        (["--model.optimizer.help"], ["AdamW:", "--model.optimizer takes OptimizerPart.", "\n  Muon"]),
        (["--model.optimizer.help", "Muon"], ["--model.optimizer.momentum float  (default 0.95)\n      Momentum"]),
        (["--model.model.help"], ["import path of a torch.nn.Module", "\n  TransformerConfig"]),
        (["--trainer.callbacks.help", "SampleText"], ["--trainer.callbacks.max_new_tokens int|null  (default null)"]),
        (["--config", "sft/reverse", "--data.help"], ["ChatDataModule:", "\n  TextDataModule"]),
        (["--trainer.help"], ["--trainer.max_steps int  (default -1)"]),
        (["--ckpt_path.help"], ["--ckpt_path takes TEXT|PATH|null."]),
    ],
)
def test_help_is_asked_for_by_key(capsys, words, needed):
    assert main(["fit", *words]) == 0
    text = capsys.readouterr().out
    for part in needed:
        assert part in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.help", "GRPOModul"], "Unknown class 'GRPOModul' for model. Did you mean 'GRPOModule'?"),
        (["--model.optimiser.help"], "Unknown key 'optimiser' in PretrainModule. Did you mean 'optimizer'?"),
    ],
)
def test_what_does_not_exist_has_no_help(capsys, words, message):
    assert main(["fit", *words]) == 2
    assert message in capsys.readouterr().err
