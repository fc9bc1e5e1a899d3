"""Everything that the README shows is run: commands with a tiny model in place of the real one, Python as it stands."""

import argparse
import html
import importlib
import re
import shlex
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml
from lightning.pytorch import Callback

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = """
trainer: {max_steps: 2, accelerator: cpu, log_every_n_steps: 1}
model: {model: {d_model: 32, num_layers: 1, context_length: 32}}
data: {train: corpus, tokenizer: {vocab_size: 280}, context_length: 32, batch_size: 4}
"""
TINY_SWEEP = """
trainer: {accelerator: cpu, limit_val_batches: 2}
data: {train: corpus, context_length: 32, batch_size: 4}
model: {model: {context_length: 32}}
sweep:
  flops: [1.5e+8, 3.0e+8, 6.0e+8]
  held_out_flops: 1.0e+9
  models: [{model.model.d_model: 8}, {model.model.d_model: 16}, {model.model.d_model: 32}]
"""
ENDLESS = ("serve", "chat")
"""Verbs that wait for somebody: their arguments are parsed here, and they run in tests of their own."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = [line.rpartition("&& .venv/bin/")[2] for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("lightning-lm")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a corpus, pages of a crawl and a finished tiny run, as the README assumes."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "corpus").mkdir()
    for number in range(30):
        (folder / "corpus" / f"{number}.txt").write_text(f"def main({number}):\n    return {number}\n" * 9)
    (folder / "crawl").mkdir()
    for number, text in enumerate(sorted(topics.values(), key=len)[-20:]):
        paragraphs = "".join(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n"))
        (folder / "crawl" / f"{number}.html").write_text(f"<html><body><main>{paragraphs}</main></body></html>")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "tiny_sweep.yaml").write_text(TINY_SWEEP)
    return folder


def all_but_one_are_finished(arguments: list[str]) -> None:
    """Put all runs of a sweep but the last into its ledger; the documentation has a page that trains them all."""
    from lightning_lm.cli.recipes import find_recipe
    from lightning_lm.cli.sweep_plan import SweepPlan
    from lightning_lm.scaling import RunLedger, RunRecord

    configs = [arguments[at + 1] for at, word in enumerate(arguments) if word == "--config"]
    recipe, tiny = (yaml.safe_load(text)["sweep"] for text in (find_recipe(configs[0]).read_text(), TINY_SWEEP))
    trials = SweepPlan.from_dict({**recipe, **tiny}).trials(configs)
    for trial in trials[:-1]:
        size = 400.0 * trial.settings["model.model.d_model"]
        tokens = trial.flops / (6 * size)
        loss = 1.7 + 40 / size**0.4 + 50 / tokens**0.4
        sizes = {"parameters": {"products": size, "total": size}, "flops_per_token": {"products": 6 * size}}
        record = RunRecord(**sizes, tokens=round(tokens), loss=loss, hyper_parameters=trial.settings)
        RunLedger(arguments[arguments.index("--ledger") + 1]).add(record)


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[1:3]))
def test_a_command_of_the_readme_runs(words, workplace, monkeypatch, capsys):
    from lightning_lm.cli import main

    monkeypatch.chdir(workplace)
    arguments = words[1:]
    if arguments[0] in ENDLESS:
        parser = argparse.ArgumentParser(arguments[0])
        importlib.import_module(f"lightning_lm.cli.{arguments[0]}").add_arguments(parser)
        assert parser.parse_args(arguments[1:]).checkpoint is not None
        return
    if arguments[0] in ("fit", "profile", "sweep"):
        at = arguments.index("--config") + 2
        arguments[at:at] = ["--config", "tiny_sweep.yaml" if arguments[0] == "sweep" else "tiny.yaml"]
        arguments = ["2" if word == "2000" else word for word in arguments]
    if arguments[0] == "sweep":
        all_but_one_are_finished(arguments)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert arguments[0] != "sweep" or out.count("  spent ") == 1, out  # one was trained


def test_the_main_job_is_there_once_and_first():
    fits = [words for words in commands() if words[1] == "fit"]
    assert fits[0] == ["lightning-lm", "fit", "--config", "recipes/pretrain/quickstart.yaml"]


def test_two_commands_set_themselves_up():
    first, second = (line for block in blocks("bash") for line in block.splitlines() if "venv" in line)
    assert first.startswith("python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/lightning-lm fit")
    assert second == 'python3 -m venv .venv && .venv/bin/pip install ".[dev]" && .venv/bin/pytest -n 2'
    assert "readme_command" in (ROOT / ".ci" / "run").read_text()
    assert len(README.splitlines()) <= 200


def test_python_of_the_readme_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (code,) = (block for block in blocks("python") if "Trainer" in block)
    for real, tiny in {
        "d_model=512": "d_model=32",
        "num_layers=8": "num_layers=1",
        "max_steps=2000": "max_steps=1",
    }.items():
        assert real in code
        code = code.replace(real, tiny)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_yaml_of_the_readme_is_a_configuration(workplace, monkeypatch, capsys):
    from lightning_lm.cli import main

    monkeypatch.chdir(workplace)
    (text,) = blocks("yaml")
    Path("my.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "my.yaml", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == 2000
    assert printed["model"]["init_args"]["optimizer"]["class_path"].endswith("AdamW")


def test_every_callback_has_a_row():
    from lightning_lm import callbacks

    section = README.partition("\n## Callbacks\n")[2].partition("\n## ")[0]
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
    rows = set(re.findall(r"`(\w+)`", first_cells))
    exported = {name: getattr(callbacks, name) for name in callbacks.__all__}
    assert rows == {name for name, value in exported.items() if isinstance(value, type) and issubclass(value, Callback)}


def test_every_part_of_the_table_exists():
    from lightning_lm import models, modules

    table = README.partition("| part | choices |")[2].partition("\n\n")[0]
    names = set(re.findall(r"`([A-Z]\w+)`", table))
    assert len(names) > 15
    assert [name for name in names if not (hasattr(models, name) or hasattr(modules, name))] == []


def test_every_mixer_and_feed_forward_part_has_a_place():
    from lightning_lm import models

    parts = {value for value in vars(models).values() if isinstance(value, type) and issubclass(value, models.Mixer)}
    parts |= {value for value in vars(models).values() if isinstance(value, type) and issubclass(value, models.FFN)}
    hidden = {
        "Mixer",
        "FFN",
        "RecurrentPart",
        "MuPAttention",
        "CrossAttention",
    }  # bases; two that other sections and parts bring along
    assert {part.__name__ for part in parts} - hidden <= set(re.findall(r"`(\w+)`", README))


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
