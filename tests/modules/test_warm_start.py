"""Models and tokenizers that start from what was trained before."""

import pytest
import torch

from lightning_lm.errors import CheckpointError, ConfigurationError, TokenizerError
from lightning_lm.models import save_huggingface
from lightning_lm.modules import CheckpointModel, PretrainModule, SFTModule, load_model
from lightning_lm.tokenizers import CharacterTokenizer, LoadTokenizer, load_tokenizer

LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz012")  # 31 ids with the special ones


@pytest.fixture
def checkpoint(config, row_data, make_trainer, tmp_path):
    """A file that a run left, with a tokenizer."""

    def make(tokenizer=LETTERS):
        torch.manual_seed(0)
        data = row_data()
        data.tokenizer = tokenizer
        trainer = make_trainer(max_steps=2)
        trainer.fit(PretrainModule(config), datamodule=data)
        trainer.save_checkpoint(tmp_path / "first.ckpt")
        return tmp_path / "first.ckpt"

    return make


def test_a_run_goes_on_from_a_checkpoint_of_another(checkpoint, rows, loader, make_trainer):
    path = checkpoint()
    before, _ = load_model(path)
    part = CheckpointModel(checkpoint=str(path))
    module = SFTModule(part)
    module.configure_model()
    assert module.model.training
    for name, value in before.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], value)
    make_trainer(max_steps=1).fit(module, loader(rows(8), 4))
    assert not torch.equal(module.model.head.weight, before.head.weight)
    assert CheckpointModel.from_dict(part.to_dict()) == part


def test_its_own_checkpoint_needs_the_first_no_more_to_be_read(checkpoint, rows, loader, make_trainer, tmp_path):
    path = checkpoint()
    module, trainer = SFTModule(CheckpointModel(checkpoint=str(path))), make_trainer(max_steps=1)
    trainer.fit(module, loader(rows(8), 4))
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    path.unlink()
    model, _ = load_model(tmp_path / "second.ckpt")
    assert torch.equal(model.head.weight, module.model.head.weight)


def test_a_folder_of_hugging_face(config, tmp_path):
    torch.manual_seed(0)
    model = config.build()
    save_huggingface(model, tmp_path / "folder", LETTERS)
    loaded = CheckpointModel(checkpoint=str(tmp_path / "folder"), context_length=5).build(31)
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert loaded.config.context_length == 5
    assert load_tokenizer(tmp_path / "folder").fingerprint == LETTERS.fingerprint


def test_the_tokenizer_lies_in_the_checkpoint(checkpoint, tmp_path):
    path = checkpoint()
    assert LoadTokenizer(path=str(path)).build(list).fingerprint == LETTERS.fingerprint
    with pytest.raises(TokenizerError, match="carries no tokenizer"):
        load_tokenizer(checkpoint(tokenizer=None))
    (tmp_path / "other.ckpt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(tmp_path / "other.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(TokenizerError, match="no checkpoint of this package"):
        load_tokenizer(tmp_path / "other.ckpt")


def test_what_cannot_be_started_from(checkpoint):
    with pytest.raises(CheckpointError, match="Train that one first"):
        CheckpointModel(checkpoint="nowhere.ckpt").build()
    with pytest.raises(ConfigurationError, match="32 ids"):
        CheckpointModel(checkpoint=str(checkpoint())).build(32)
