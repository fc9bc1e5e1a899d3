"""The road in one command: its plan, its processes, a tiny road that is killed and resumed, its report."""

import argparse
import contextlib
import json
from html.parser import HTMLParser

import pytest

from lightning_lm.cli import main, road
from lightning_lm.cli.road.measure import main as measure
from lightning_lm.cli.road.process import Usage
from lightning_lm.errors import ConfigurationError, LightningLMError, UsageError
from lightning_lm.storage import held

WORDS = [*["the", "model", "reads", "a", "line", "and", "says", "what", "follows", "it"], *"0123456789="]
TINY = """
base: road/offline
title: A <tiny> road
prompts: ["the model", "31415="]
stages:
  curate: {command: "curate --config clean.yaml --input corpus --output {output}/corpus --overwrite --num-workers 1"}
  tokenizer:
    command: >-
      tokenizer train --input {output}/corpus --hold-out 0.2 --output {output}/tokenizer --vocab-size 280 --overwrite
      --num-workers 1
  pretrain:
    settings: &text
      data.validation: 0.2
      data.context_length: 32
      data.batch_size: 2
      data.loading.show_progress: false
      model.model.d_model: 16
      model.model.num_layers: 1
      trainer.max_steps: 4
      trainer.val_check_interval: 2
      trainer.log_every_n_steps: 1
      trainer.callbacks.LastCheckpoint.every_n_train_steps: 1
  sft:
    settings: &few
      trainer.max_steps: 2
      trainer.limit_val_batches: 1
      trainer.log_every_n_steps: 1
      data.batch_size: 4
      data.train.num_examples: 40
      data.validation.num_examples: 8
  dpo: {settings: *few}
  grpo:
    settings:
      <<: *few
      model.plan.samples_per_prompt: 2
scores:
  text: {settings: {data.validation: 0.2, data.context_length: 32, trainer.limit_val_batches: 1}}
  task:
    settings:
      trainer.limit_val_batches: 1
      data.batch_size: 4
      data.train.num_examples: 40
      data.validation.num_examples: 8
  tasks: {command: evaluate --tasks reverse --limit 4 --shots 1, metrics: [reverse/exact_match]}
"""


class InProcess:
    """Runs everything in this process, which has torch already; may fail before a stage."""

    def __init__(self):
        self.verbs, self.measured = [], []

    def verb(self, words, log, tick):
        self.verbs.append(words)
        return self._logged(log, tick, lambda: main(words))

    def measure(self, job, log, tick):
        self.measured.append(job.name.split(".")[0])
        return self._logged(log, tick, lambda: measure(str(job)))

    def _logged(self, log, tick, call):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = call()
        tick(1.0, 2.0)
        return Usage(status, 1.5, 2.5, 3 * 2**20)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_LM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for number in range(30):
        text = " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 60))
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    (tmp_path / "clean.yaml").write_text("steps: [ExactDuplicates]\n")
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def arguments(*words, config="tiny.yaml"):
    parser = argparse.ArgumentParser()
    road.add_arguments(parser)
    line = " ".join(["lightning-lm road --config", config, *words])
    return parser.parse_args(["--config", config, *words], argparse.Namespace(command_line=line))


KILLER = """
import os
from lightning.pytorch import Callback

class Killer(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and not os.path.exists("killed"):
            open("killed", "w").close()
            raise MemoryError("killed here")
"""


def test_a_tiny_road_is_killed_resumed_reported_and_not_run_twice(workplace, capsys):
    (workplace / "killer.py").write_text(KILLER)
    words = ("--set", "pretrain.trainer.callbacks+=[{class_path: killer.Killer}]")
    first = InProcess()
    with pytest.raises(MemoryError, match="killed here"):
        road.run(arguments(*words), first)
    assert [name for name, *_ in first.verbs] == ["curate", "tokenizer", "fit"]

    second = InProcess()
    assert road.run(arguments(*words), second) == 0
    assert [verb[0] for verb in second.verbs] == ["fit"] * 4
    assert [verb[-2:] == ["--ckpt_path", "last"] for verb in second.verbs] == [True, False, False, False]
    assert second.measured == ["pretrain", "sft", "dpo", "grpo"]  # the untrained model was measured before
    assert len(list((workplace / "road/runs/pretrain").glob("version_*"))) == 1

    report = json.loads((workplace / "road/report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    pretrain = stages["pretrain"]
    assert pretrain["curves"]["train/loss"]["steps"] == [1, 2, 3, 4]
    assert pretrain["num_tokens"] == 4 * 2 * 32
    assert pretrain["attempts"] == 2
    assert stages["grpo"]["curves"]["train/reward"]["steps"]
    assert all(set(stages[name]["scores"]) == set(report["metrics"]) for name in ("pretrain", "sft", "dpo", "grpo"))
    assert report["untrained"]["scores"].keys() == {"val/bits_per_byte", "reverse/exact_match"}
    assert all(len(stage["samples"]) == 2 for stage in (report["untrained"], *report["stages"][2:]))
    assert report["totals"]["cpu_s"] == pytest.approx(2.0 + 4 * 2.5 + 2 * 2.5 + 5 * 2.5, abs=2.6)

    page = Page((workplace / "road/report.html").read_text())
    assert not page.tags & {"script", "img", "link", "iframe"}
    assert "A <tiny> road" in page.text
    assert all(stage["command"] in page.text for stage in report["stages"])

    third = InProcess()
    assert road.run(arguments(*words), third) == 0
    assert third.verbs == third.measured == []
    assert "finished before" in capsys.readouterr().out

    changed = InProcess()  # another setting of a stage: it and what starts from it are run again, in new folders
    assert road.run(arguments(*words, "--set", "dpo.model.loss.beta=0.3"), changed) == 0
    assert [verb[verb.index("--trainer.logger.name") + 1] for verb in changed.verbs] == ["dpo", "grpo"]
    assert "--ckpt_path" not in changed.verbs[0]
    assert (workplace / "road/runs/dpo/version_1/run.json").is_file()


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


COMMANDS = """
title: Commands
stages:
  first: {command: recipes list}
  second: {command: recipes show nothing}
  third: {command: recipes list}
"""


def test_a_stage_that_fails_is_named_with_its_log_and_the_command_to_continue(workplace, capsys):
    (workplace / "own.yaml").write_text(COMMANDS)
    runner = InProcess()
    with pytest.raises(LightningLMError) as failed:
        road.run(arguments("--output", "out", config="own.yaml"), runner)
    message = str(failed.value)
    assert message.startswith("The stage 'second' ended with status 1: ")
    assert "No recipe is called 'nothing'" in message
    assert "All of its output: out/logs/02-second.log" in message
    assert message.endswith("Continue with: lightning-lm road --config own.yaml --output out")
    stages = json.loads((workplace / "out/report.json").read_text())["stages"]
    assert [stage["status"] for stage in stages] == ["finished", "failed"]

    again = InProcess()
    road.run(arguments("--output", "out", "--only", "third", config="own.yaml"), again)
    assert len(again.verbs) == 1
    (workplace / "own.yaml").write_text(COMMANDS.replace("show nothing", "show sft/reverse"))
    repaired = InProcess()
    assert road.run(arguments("--output", "out", config="own.yaml"), repaired) == 0
    assert repaired.verbs == [["recipes", "show", "sft/reverse"], ["recipes", "list"]]


def test_a_second_road_in_a_folder_is_told_who_is_there(workplace):
    (workplace / "own.yaml").write_text(COMMANDS)
    with (
        held(workplace / "out", "x"),
        pytest.raises(ConfigurationError, match=r"out is in use by process .* use another --output"),
    ):
        road.run(arguments("--output", "out", config="own.yaml"), InProcess())


def test_a_stage_needs_the_one_that_it_starts_from(workplace):
    with pytest.raises(UsageError, match="'sft' starts from 'pretrain', which has not finished in road"):
        road.run(arguments("--only", "sft"), InProcess())


def test_a_record_of_something_else_is_refused(workplace):
    (workplace / "own.yaml").write_text(COMMANDS)
    (workplace / "out").mkdir()
    for text in ("{", "[]", '{"version": 99}', '{"version": 1, "stages": {"first": {"color": 3}}}'):
        (workplace / "out/road.json").write_text(text)
        with pytest.raises(ConfigurationError, match=r"road\.json is no record that this release can continue"):
            road.run(arguments("--output", "out", config="own.yaml"), InProcess())


def test_a_dry_run_prints_the_commands_and_makes_nothing(workplace, capsys):
    assert main(["road", "--config", "tiny.yaml", "--dry-run", "--until", "pretrain"]) == 0
    printed = capsys.readouterr().out
    assert "lightning-lm fit --config pretrain/quickstart" in printed
    assert "grpo" not in printed
    assert not (workplace / "road").exists()
