"""Renamed keys: old ones are read from files, lists and the command line, with a warning, and never written."""

import re
from pathlib import Path

import pytest
import yaml

from lightning_lm.cli import main
from lightning_lm.cli.config.check import with_new_names
from lightning_lm.deprecation import RENAMED_ARGUMENTS, new_argument

OLD = """
trainer:
  strategy: {class_path: DataParallelStrategy, init_args: {exchange: flat}}
  callbacks+: [{class_path: Completions, init_args: {answers: 3}}]
data: {rows: {learn_on: all}}
"""


def printed(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words, "--print_config"])
    assert not ended.value.code
    return yaml.safe_load(capsys.readouterr().out)


def settings_of(config, name):
    """Return the constructor's arguments of a class, wherever it stands in a configuration."""
    if isinstance(config, list):
        return next((found for item in config if (found := settings_of(item, name)) is not None), None)
    if not isinstance(config, dict):
        return None
    if str(config.get("class_path")).endswith(f".{name}"):
        return config["init_args"]
    return settings_of([*config.values()], name)


def test_old_keys_of_a_file_are_read_with_a_warning_that_names_the_line(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(OLD)
    with pytest.warns(UserWarning, match="is now called") as warned:
        config = printed(["--config", "sft/chat", "--config", str(tmp_path / "old.yaml")], capsys)
    assert settings_of(config, "DataParallelStrategy")["communication"] == "flat"
    assert settings_of(config, "Completions")["completions"] == 3
    assert config["data"]["init_args"]["rows"]["init_args"]["train_on"] == "all"
    texts = [str(warning.message) for warning in warned if warning.category is UserWarning]
    lines = {"exchange": 3, "answers": 4, "learn_on": 5}
    for cls, old in (("DataParallelStrategy", "exchange"), ("Completions", "answers"), ("SupervisedRows", "learn_on")):
        new = RENAMED_ARGUMENTS[cls][old]
        wanted = rf"^{old} of {cls} is now called {new}; version 0\.3 removes .*old\.yaml, line {lines[old]}\.$"
        assert [text for text in texts if re.search(wanted, text)], texts


def test_old_keys_of_the_command_line_are_read_too(capsys):
    words = ["--trainer.strategy", "DataParallelStrategy", "--trainer.strategy.exchange=flat"]
    words += ["--trainer.callbacks+=Completions", "--trainer.callbacks.Completions.answers", "3"]
    words += ["--data.rows.learn_on", "all"]
    with pytest.warns(UserWarning, match="train_on; version 0.3 removes the old name. Written in the command line"):
        config = printed(["--config", "sft/chat", *words], capsys)
    assert settings_of(config, "DataParallelStrategy")["communication"] == "flat"
    assert settings_of(config, "Completions")["completions"] == 3
    assert config["data"]["init_args"]["rows"]["init_args"]["train_on"] == "all"


def test_an_old_key_in_an_item_that_a_later_file_repeats(tmp_path, capsys):
    """The second file changes another item of the list, so the list is written out again with the first item."""
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "later.yaml").write_text("trainer: {callbacks: {Throughput: {peak_flops_per_s: 1.0e+12}}}")
    files = [f"--config={tmp_path / name}.yaml" for name in ("old", "later")]
    with pytest.warns(UserWarning, match="is now called completions"):
        config = printed(["--config", "sft/chat", *files], capsys)
    assert settings_of(config, "Throughput")["peak_flops_per_s"] == 1e12
    assert settings_of(config, "Completions")["completions"] == 3


def test_only_the_key_at_that_path_is_renamed():
    words = ["--a.x", "1", "--a.b.x=2", "--list+={class_path: C, init_args: {x: 3}}", "--text", "{x: 4", "--x", "5"]
    found = with_new_names(words, {"a.b.x": "y", "list.x": "y"})
    assert found[:3] == ["--a.x", "1", "--a.b.y=2"]
    assert yaml.safe_load(found[3].partition("=")[2]) == {"class_path": "C", "init_args": {"y": 3}}
    assert found[4:] == ["--text", "{x: 4", "--x", "5"]


def test_a_class_of_the_user_with_the_name_of_one_of_ours_keeps_its_keys():
    assert new_argument(type("Completions", (), {}), "answers") is None


def test_no_recipe_and_no_page_writes_an_old_key(root: Path):
    old = "|".join(sorted({name for names in RENAMED_ARGUMENTS.values() for name in names}))
    files = [*(root / "recipes").rglob("*.yaml"), *(root / "docs").rglob("*.md")]
    found = [str(path) for path in files if re.search(rf"\b({old}): |\.({old})\b", path.read_text(encoding="utf-8"))]
    assert found == []
