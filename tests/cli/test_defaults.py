"""A part that replaces another starts from its own defaults, wherever it is named."""

from pathlib import Path

import pytest
import yaml

from lightning_lm.cli import main
from lightning_lm.models import GLU, MLP, LayerNorm
from lightning_lm.optim import AdamW, Muon

RECIPE = """
model:
  model:
    class_path: TransformerConfig
    init_args: {d_model: 32, num_layers: 1, layers: {ffn: {class_path: GLU, init_args: {hidden_size: 64}}}}
  optimizer: {class_path: Muon, init_args: {lr: 0.5, weight_decay: 0.7}}
"""


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    with pytest.raises(SystemExit):
        main(["fit", *words, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "base.yaml").write_text(RECIPE)
    return str(tmp_path / "base.yaml")


def test_an_overlay_that_names_another_class(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(
        "base: base\nmodel:\n  optimizer: {class_path: AdamW, init_args: {eps: 1.0e-6}}\n"
        "  model: {norm: LayerNorm, layers: {ffn: {class_path: MLP}}}\n"
    )
    config = printed(capsys, "--config", str(overlay))
    optimizer, model = config["optimizer"]["init_args"], config["model"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["eps"]) == (AdamW.lr, AdamW.weight_decay, 1e-6)
    assert model["norm"]["init_args"]["eps"] == LayerNorm.eps
    ffn = model["layers"]["init_args"]["ffn"]
    assert (ffn["init_args"]["activation"], ffn["init_args"]["hidden_size"]) == (MLP.activation, None)
    assert model["d_model"] == 32


def test_the_command_line_that_names_another_class(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model.optimizer", "AdamW", "--model.optimizer.eps", "1e-6")
    optimizer = printed(capsys, "--config", recipe, *words)["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["eps"]) == (AdamW.lr, AdamW.weight_decay, 1e-6)


def test_the_same_class_again_keeps_what_was_set(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("base: base\nmodel:\n  optimizer: {class_path: Muon, init_args: {momentum: 0.9}}\n")
    optimizer = printed(capsys, "--config", str(overlay))["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["momentum"]) == (0.5, 0.7, 0.9)
    assert Muon.lr != 0.5
    assert GLU.hidden_size is None


def test_a_class_below_one_that_is_named_again_lands_inside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in every config that a run has saved: the layer's defaults are written out, and ``ffn`` belongs among them."""
    (tmp_path / "mine.yaml").write_text(
        "model:\n  model:\n    class_path: TransformerConfig\n"
        "    init_args: {d_model: 32, num_layers: 1, layers: {ffn: {class_path: MLP, init_args: {bias: true}}}}\n"
    )
    layers = printed(capsys, "--config", str(tmp_path / "mine.yaml"))["model"]["init_args"]["layers"]["init_args"]
    assert layers["ffn"]["class_path"].endswith(".MLP")
    assert layers["ffn"]["init_args"] == {"hidden_size": None, "activation": MLP.activation, "bias": True}
