"""The Trainer's verbs end to end: mistakes, folders of runs, resuming, also after a kill."""

import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from lightning_lm.cli import main

TINY = """
base: base/trainer
trainer:
  max_steps: {steps}
  val_check_interval: 100
  log_every_n_steps: 1
  accelerator: cpu
  logger: {{init_args: {{name: tiny}}}}
  callbacks: [{{class_path: LastCheckpoint, init_args: {{every_n_train_steps: 2}}}}]
  enable_progress_bar: false
  enable_model_summary: false
model:
  model:
    class_path: TransformerConfig
    init_args: {{d_model: 16, num_layers: 1, layers: {{mixer: {{num_heads: 2}}}}}}
  optimizer: {{class_path: Muon, init_args: {{lr: 0.01}}}}
data: {{train: corpus, tokenizer: Bytes, context_length: 16, batch_size: 2}}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Return a folder that holds tiny.yaml and a corpus, and is the current one."""
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"document {number}: " + "abc def " * number)
    (tmp_path / "tiny.yaml").write_text(TINY.format(steps=4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler holds the stderr of an earlier test
    return tmp_path


def fit(*words: str) -> int:
    return main(["fit", "--config", "tiny.yaml", *words])


def state(path: Path | str) -> dict:
    return torch.load(path, weights_only=True)


def weights(path: Path | str) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state(path)["state_dict"].values()])


MISTAKES = [
    (["--model.optimizer.weight_deacy=1"], "Unknown key 'weight_deacy' in Muon. Did you mean 'weight_decay'?"),
    (["--model.optimizer=Muonn"], "Unknown class 'Muonn' for model.optimizer. Did you mean 'Muon'?"),
    (["--model.model.d_modl=3"], "Unknown key 'd_modl' in TransformerConfig. Did you mean 'd_model'?"),
    (["--trainer.max_step=3"], "Unknown key 'max_step' in Trainer. Did you mean 'max_steps'?"),
    (["--trainer.callbacks+=Perplexty"], "Unknown class 'Perplexty' for trainer.callbacks. Did you mean 'Perplexity'?"),
    (["--data.batch_sise=3"], "Unknown key 'batch_sise' in TextDataModule. Did you mean 'batch_size'?"),
    (["--modl.x=3"], "Unknown key 'modl' in the configuration. Did you mean 'model'?"),
    (["--data.batch_size=many"], "data.batch_size: needs int, got many"),
    (["--model.compile=always"], "model.compile: needs one of 'none', 'blocks', got always"),
    (["--config", "tinny.yaml"], "--config 'tinny.yaml' is neither a file nor a recipe."),
    (["--trainer", "missing.yaml"], "--trainer 'missing.yaml': there is no such file"),
    (
        ["--trainer", "max_steps=5"],
        "--trainer takes a YAML file, got 'max_steps=5'. For one setting write --trainer.max_st",
    ),
    (
        ["--trainer", "max_steps"],
        "--trainer takes a YAML file, got 'max_steps'. For one setting write --trainer.max_steps",
    ),
    (["--data", "corpus/"], "data takes the name of a class, got 'corpus/'."),
    (["--model.model=../folder"], "model.model takes the name of a class, got '../folder'."),
    (["--model.optimizer=torch.optim.AdamW"], "torch.optim.AdamW is no OptimizerPart, which model.optimizer takes."),
    (["--trainer.callbacks+=LoRA", "--trainer.callbacks.adaptors.rank=3"], "Unknown key 'adaptors' in LoRA."),
]


@pytest.mark.parametrize(("words", "first_line"), MISTAKES)
def test_a_mistake_is_the_first_thing_that_is_printed(tiny, capsys, words, first_line):
    assert fit(*words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(first_line)
    assert len(printed.err.splitlines()) <= 3
    assert printed.out == ""


REFUSED = [
    (["--model.model.layers.mixer.num_heads=0"], "num_heads=0 must be at least 1.\n  Written in the command line.\n"),
    (["--trainer.gradient_clip_val=-1.5"], "gradient_clip_val=-1.5 must be at least 0."),
    (["--model.optimizer.lr=-1"], "lr=-1.0 must be at least 0.\n  Written in the command line."),
    (["--model.optimizer", "AdamW", "--model.optimizer.betas", "[0.9, 2]"], "betas=(0.9, 2.0) must be at least 0 and"),
    (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches=0 must be at least 1."),
    (["--trainer.log_every_n_steps=-1"], "log_every_n_steps=-1 must be at least 0."),
    (["--seed_everything=-1"], "seed_everything=-1 must be from 0 to 4294967295."),
    (["--data.batch_size=0"], "batch_size must be at least 1, got 0."),
    (["--trainer.accelerator=gpu"], "No supported gpu backend found!"),
    (["--trainer.strategy=nonsense"], "You selected an invalid strategy name"),
    (["--ckpt_path=best"], '`.fit(ckpt_path="best")` is set but `ModelCheckpoint` is not configured'),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_a_setting_that_a_constructor_or_lightning_refuses_is_no_traceback(tiny, capsys, words, said):
    assert fit(*words) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed


def test_a_fault_of_the_users_own_class_keeps_its_traceback(tiny):
    (tiny / "own_callbacks.py").write_text(OWN_CALLBACK)
    with pytest.raises(ValueError, match="too many values"):
        fit("--trainer.callbacks+=own_callbacks.Broken")


OWN_CALLBACK = """
from lightning.pytorch import Callback

class Broken(Callback):
    def on_fit_start(self, trainer, pl_module):
        one, two = 1, 2, 3
"""


def configured(capsys, *words: str) -> dict:
    """Return the configuration that a run would have."""
    with pytest.raises(SystemExit) as end:
        fit(*words, "--print_config")
    assert end.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("beside", [(), ("--model.optimizer=AdamW",), ("--data.tokenizer=Bytes",)])
def test_an_appended_item_keeps_the_list_and_takes_options(tiny, capsys, beside):
    appended = ["--trainer.callbacks+=LoRA", "--trainer.callbacks.adapters.rank=3"]
    appended += ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5"]
    callbacks = configured(capsys, *beside, *appended)["trainer"]["callbacks"]
    names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
    assert names == ["LastCheckpoint", "LoRA", "EMA"]
    assert callbacks[1]["init_args"]["adapters"]["init_args"]["rank"] == 3
    assert callbacks[2]["init_args"]["decay"] == 0.5


def test_files_of_one_key_are_read_as_lightning_cli_reads_them(tiny, capsys):
    (tiny / "t.yaml").write_text("max_steps: 7\n")
    (tiny / "m.yaml").write_text("model:\n  optimizer: {class_path: AdamW, init_args: {lr: 0.123}}\n")
    (tiny / "d.yaml").write_text("batch_size: 3\n")
    config = configured(capsys, "--trainer", "t.yaml", "--model=m.yaml", "--data", "d.yaml")
    assert config["trainer"]["max_steps"] == 7
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.123
    assert config["data"]["init_args"]["batch_size"] == 3


def test_a_file_of_the_user_is_never_replaced(tiny):
    own = (tiny / "tiny.yaml").read_text()
    (tiny / "config.yaml").write_text(own)
    assert main(["fit", "--config", "config.yaml", "--trainer.logger", "false", "--trainer.max_steps", "1"]) == 0
    assert not list(tiny.glob("config.*.yaml"))
    folder = tiny / "runs/tiny/version_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("mine: true\n")
    assert fit("--trainer.logger.version=0", "--trainer.max_steps=1") == 0
    assert (folder / "config.yaml").read_text() == "mine: true\n"
    assert yaml.safe_load((folder / "config.1.yaml").read_text())["trainer"]["max_steps"] == 1


def test_a_mistake_in_yaml_names_its_line(tiny, capsys):
    text = TINY.format(steps=4).replace("num_heads", "num_head")
    (tiny / "tiny.yaml").write_text(text)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "num_head" in line)
    assert fit() == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Unknown key 'num_head' in Attention. Did you mean 'num_heads'?")
    assert f"tiny.yaml, line {line}," in printed


def test_an_error_of_ours_is_one_block_without_traceback(tiny, capsys):
    assert fit("--model.model.layers.mixer.num_heads=3") == 1
    printed = capsys.readouterr().err
    assert "Error (ConfigurationError)" in printed
    assert "Traceback" not in printed


def test_each_fresh_run_has_its_own_folder_and_its_whole_configuration(tiny):
    assert fit() == 0
    before = (tiny / "runs/tiny/version_0/checkpoints/last.ckpt").read_bytes()
    assert fit("--seed_everything=2") == 0
    assert (tiny / "runs/tiny/version_0/checkpoints/last.ckpt").read_bytes() == before
    first, second = (yaml.safe_load((tiny / f"runs/tiny/version_{n}/config.yaml").read_text()) for n in (0, 1))
    assert (first["seed_everything"], second["seed_everything"]) == (1, 2)
    assert first["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01


def test_the_saved_configuration_repeats_the_run(tiny):
    assert fit() == 0
    assert main(["fit", "--config", "runs/tiny/version_0/config.yaml"]) == 0
    first, second = (weights(f"runs/tiny/version_{n}/checkpoints/last.ckpt") for n in (0, 1))
    assert torch.equal(first, second)


def test_the_last_step_is_saved_though_n_does_not_divide_it(tiny):
    assert fit("--trainer.max_steps=3") == 0
    assert state("runs/tiny/version_0/checkpoints/last.ckpt")["global_step"] == 3


def test_last_without_a_checkpoint_starts_from_the_beginning_and_says_so(tiny, capsys):
    assert fit("--ckpt_path=last") == 0
    assert "No checkpoint under runs/tiny: training starts from the beginning." in capsys.readouterr().err
    assert state("runs/tiny/version_0/checkpoints/last.ckpt")["global_step"] == 4


def test_last_without_a_checkpoint_is_an_error_where_nothing_is_trained(tiny, capsys):
    assert main(["validate", "--config", "tiny.yaml", "--ckpt_path", "last"]) == 1
    assert "there is no last*.ckpt under runs/tiny" in capsys.readouterr().err


def test_last_goes_on_in_the_same_folder_and_keeps_the_earlier_configuration(tiny):
    assert fit("--model.schedule", "Constant", "--trainer.max_steps=7") == 0
    assert fit("--model.schedule", "Constant") == 0
    assert fit("--model.schedule", "Constant", "--trainer.max_steps=7", "--ckpt_path=last") == 0
    folder = tiny / "runs/tiny/version_1"
    assert not (tiny / "runs/tiny/version_2").exists()
    assert state(folder / "checkpoints/last.ckpt")["global_step"] == 7
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 7
    assert yaml.safe_load((folder / "config.1.yaml").read_text())["trainer"]["max_steps"] == 4
    whole = weights("runs/tiny/version_0/checkpoints/last.ckpt")
    assert torch.equal(weights(folder / "checkpoints/last.ckpt"), whole)


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_last_falls_back_to_the_last_sound_checkpoint_of_the_run_and_says_so(tiny, capsys):
    assert fit("--model.schedule", "Constant", "--trainer.max_steps=3") == 0
    folder = tiny / "runs/tiny/version_0/checkpoints"
    shutil.copy(folder / "last.ckpt", folder / "step=3.ckpt")
    assert fit("--model.schedule", "Constant", "--trainer.max_steps=4", "--ckpt_path=last") == 0
    damage(folder / "last.ckpt")
    capsys.readouterr()
    assert fit("--model.schedule", "Constant", "--trainer.max_steps=5", "--ckpt_path=last") == 0
    printed = capsys.readouterr().err
    assert re.search(r"last\.ckpt is damaged: archive/data/\d+, bytes", printed)
    assert re.search(r"\nResuming from .*step=3\.ckpt instead\.", printed)
    assert state(folder / "last.ckpt")["global_step"] == 5
    damage(folder / "last.ckpt")
    damage(folder / "step=3.ckpt")
    assert fit("--ckpt_path=last") == 1
    printed = capsys.readouterr().err
    assert "last.ckpt is damaged" in printed
    assert "No other checkpoint in" in printed


def test_validate_measures_the_last_checkpoint(tiny, capsys):
    assert fit() == 0
    words = ["--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.callbacks", "Perplexity"]
    assert main(["validate", *words]) == 0
    assert "val/bits_per_byte" in capsys.readouterr().out


def test_a_file_that_is_no_checkpoint_is_a_clear_error(tiny, capsys):
    (tiny / "last.ckpt").write_bytes(b"not a checkpoint")
    assert fit("--ckpt_path=last.ckpt") == 1
    printed = capsys.readouterr().err
    assert "last.ckpt" in printed
    assert "Traceback" not in printed


def test_a_killed_run_goes_on_to_the_same_weights(tiny, monkeypatch):
    (tiny / "killer.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class Kill(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        if trainer.global_step == 5:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(str(tiny))
    child = os.fork()
    if child == 0:
        fit("--trainer.max_steps=9", "--trainer.callbacks+=killer.Kill")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert state("runs/tiny/version_0/checkpoints/last.ckpt")["global_step"] == 4
    assert fit("--trainer.max_steps=9", "--ckpt_path=last") == 0
    assert fit("--trainer.max_steps=9") == 0
    resumed, whole = (weights(f"runs/tiny/version_{n}/checkpoints/last.ckpt") for n in (0, 1))
    assert torch.equal(resumed, whole)


def test_an_interrupted_run_says_how_to_go_on(tiny, monkeypatch, capsys):
    (tiny / "stopper.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Stop(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        if trainer.global_step == 3:\n"
        "            raise KeyboardInterrupt\n"
    )
    monkeypatch.syspath_prepend(str(tiny))
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert fit("--trainer.callbacks+=stopper.Stop") == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning shuts its ears to further interrupts
    assert (
        "That was step 3; --ckpt_path last resumes from runs/tiny/version_0/checkpoints/last.ckpt"
        in capsys.readouterr().err
    )
    assert fit("--ckpt_path=last") == 0
    assert state("runs/tiny/version_0/checkpoints/last.ckpt")["global_step"] == 4


def test_a_module_and_data_of_the_users_own_need_no_other_command(tiny, monkeypatch):
    (tiny / "mine.py").write_text(
        "import torch\n"
        "from lightning.pytorch import LightningModule, LightningDataModule\n"
        "class Mine(LightningModule):\n"
        "    def __init__(self, size: int = 2):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(size, 1)\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return self.layer(batch).sum()\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), lr=0.1)\n"
        "class Data(LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        return torch.utils.data.DataLoader(torch.ones(8, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tiny))
    words = ["--model", "mine.Mine", "--model.size", "3", "--data", "mine.Data", "--trainer.max_steps", "1"]
    assert main(["fit", *words, "--trainer.logger", "false"]) == 0


def test_checkpoints_written_in_the_background_change_nothing(tiny):
    assert fit("--trainer.logger.init_args.name=plain") == 0
    plugin = "--trainer.plugins+=BackgroundCheckpointIO"
    assert fit("--trainer.logger.init_args.name=background", plugin) == 0
    plain, background = (Path(f"runs/{name}/version_0") for name in ("plain", "background"))
    assert torch.equal(weights(plain / "checkpoints/last.ckpt"), weights(background / "checkpoints/last.ckpt"))
    assert state(background / "checkpoints/last.ckpt")["global_step"] == 4
    chosen = [
        yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["precision"] for folder in (plain, background)
    ]
    assert chosen[0] == chosen[1] is not None


def test_fit_alone_says_what_to_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.startswith("model.model is missing: name a recipe, such as --config pretrain/quick")
