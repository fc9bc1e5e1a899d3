"""Every recipe parses, says the same after a round trip through --print_config, and trains two steps."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_lm.cli import main
from lightning_lm.cli.recipes import recipe_names

WORDS = ("the", "model", "reads", "a", "line", "and", "says", "what", "follows", "it")
SMALL = Path(__file__).parent / "small"
"""One overlay for each folder of recipes, which makes them small enough to run here; ``corpus`` is a folder of text."""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        text = " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 40))
        (folder / f"{number}.txt").write_text(text)
    return folder


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words, "--print_config"])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_survives_print_config(recipe, tmp_path, capsys):
    first = printed(["--config", recipe], capsys)
    (tmp_path / "printed.yaml").write_text(first)
    again = printed(["--config", str(tmp_path / "printed.yaml")], capsys)
    assert again == first


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_null_over_a_default_survives_print_config(recipe, tmp_path, capsys):
    words = ["--config", recipe, "--trainer.gradient_clip_val", "null", "--data.validation", "0"]
    first = printed(words, capsys)
    (tmp_path / "printed.yaml").write_text(first)
    assert yaml.safe_load(first)["trainer"]["gradient_clip_val"] is None
    assert printed(["--config", str(tmp_path / "printed.yaml")], capsys) == first


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_trains_two_steps(recipe, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = SMALL / f"{recipe.split('/')[0]}.yaml"
    assert small.is_file(), f"{recipe} needs {small}, which makes it small enough to run here"
    assert main(["fit", "--config", recipe, "--config", str(small)]) == 0
    (checkpoint,) = tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert (checkpoint.parents[1] / "config.yaml").is_file()
    assert "bits" in capsys.readouterr().out
