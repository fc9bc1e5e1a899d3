"""Options of one item of a list, by the name of its class."""

import pytest
import yaml

from lightning_lm.cli import main
from lightning_lm.cli.config.list_items import change_items
from lightning_lm.cli.config.overlays import expand_configs
from lightning_lm.errors import UsageError

BASE = """
trainer:
  callbacks: [LMSummary, {class_path: SampleText, init_args: {max_new_tokens: 3}}, lightning_lm.callbacks.Perplexity]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def callbacks(*words):
    """Return the list in the last word or file that writes it."""
    changed, _ = change_items(*expand_configs(["--config", "base.yaml", *words]))
    values = [word.partition("=")[2] for word in changed if word.startswith("--trainer.callbacks=")]
    configs = [yaml.safe_load(word.partition("=")[2]) for word in changed if word.startswith("--config=")]
    return yaml.safe_load(values[-1]) if values else configs[-1]["trainer"]["callbacks"]


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.callbacks.SampleText.every_n_steps", "500"],
        ["--trainer.callbacks.SampleText.every_n_steps=500"],
        ['--trainer.callbacks.SampleText={"every_n_steps": 500}'],
        ["--config=over.yaml"],
    ],
)
def test_one_option_is_changed_and_the_rest_of_the_list_stays(folder, words):
    (folder / "over.yaml").write_text("base: base\ntrainer: {callbacks: {SampleText: {every_n_steps: 500}}}")
    sample = {"class_path": "SampleText", "init_args": {"max_new_tokens": 3, "every_n_steps": 500}}
    assert callbacks(*words) == ["LMSummary", sample, "lightning_lm.callbacks.Perplexity"]


def test_options_of_several_items_and_of_the_last_one_apply_in_order():
    words = ["--trainer.callbacks.Perplexity.tokenizer=Bytes", "--trainer.callbacks+=EMA"]
    words += ["--trainer.callbacks.decay=0.5", "--trainer.callbacks.SampleText.sampling=Sampling"]
    words += ["--trainer.callbacks.SampleText.sampling.top_p", "1e-1", "--trainer.callbacks.EMA.every=2"]
    assert callbacks(*words) == [
        "LMSummary",
        {
            "class_path": "SampleText",
            "init_args": {"max_new_tokens": 3, "sampling": {"class_path": "Sampling", "init_args": {"top_p": "1e-1"}}},
        },
        {"class_path": "lightning_lm.callbacks.Perplexity", "init_args": {"tokenizer": "Bytes"}},
        {"class_path": "EMA", "init_args": {"decay": 0.5, "every": 2}},
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.callbacks.SampelText.every=1"], r"has no SampelText. Its items are: LMSummary, SampleText, Perp"),
        (["--trainer.callbacks.SampelText.every=1"], r"the command line. Did you mean SampleText\?"),
        (["--trainer.callbacks.EMA.decay=1"], r"To add one: --trainer.callbacks\+=EMA"),
        (["--trainer.callbacks+=SampleText", "--trainer.callbacks.SampleText.every=1"], "2 items of class SampleText"),
        (["--trainer.callbacks.SampleText=5"], "takes options of SampleText, got 5"),
        (["--config=over.yaml"], r"callbacks has no EMA. Its items are: LMSummary[^$]*over.yaml, line 2"),
        (["--trainer.callbacks=[]", "--trainer.callbacks.EMA.decay=1"], "Its items are: none"),
    ],
)
def test_errors_name_the_items_that_are_there(folder, words, message):
    (folder / "over.yaml").write_text("trainer:\n  callbacks: {EMA: {decay: 0.5}}")
    with pytest.raises(UsageError, match=message):
        callbacks(*words)


def test_the_parser_and_the_check_take_it(capsys):
    words = ["fit", "--config=base.yaml", "--trainer.callbacks.SampleText.every_n_steps"]
    with pytest.raises(SystemExit):
        main([*words, "1_0", "--trainer.callbacks.SampleText.sampling.top_p=5e-1", "--print_config"])
    sample = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][1]["init_args"]
    assert (sample["every_n_steps"], sample["max_new_tokens"]) == (10, 3)
    assert sample["sampling"]["init_args"]["top_p"] == 0.5
    assert sample["sampling"]["init_args"]["temperature"] == 0.8
    assert main([*words[:2], "--trainer.callbacks.SampleText.evry_n_steps=5"]) == 2
    assert "Unknown key 'evry_n_steps' in SampleText. Did you mean 'every_n_steps'?" in capsys.readouterr().err
