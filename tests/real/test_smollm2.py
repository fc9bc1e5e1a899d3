"""A published model through the whole road: read, trained, written in both formats, read again."""

import pytest
import torch
import transformers
from lightning.pytorch import Callback, Trainer

from lightning_lm.data import SupervisedRows, TokenizerTemplate
from lightning_lm.datamodules import ChatDataModule, Loading
from lightning_lm.models import export_gguf, export_model, import_gguf, load_huggingface
from lightning_lm.modules import CheckpointModel, SFTModule
from lightning_lm.optim import AdamW, Constant
from lightning_lm.tokenizers import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

TEXTS = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces 123": [216, 2701, 256, 5600, 216, 33, 34, 35],
}
"""Ids that transformers gives with the tokenizer that the Hub has."""
RECORDS = [
    {"prompt": f"What is the colour of {thing}?", "completion": f"{thing.title()}: {colour}."}
    for thing, colour in (("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red"))
]


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(trainer.callback_metrics["train/loss"]))


@torch.no_grad()
def logits(model, ids):
    out = model.eval()(ids)
    return out.logits if hasattr(out, "logits") else out


def by_transformers(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


def test_the_road_of_a_published_model(smollm2, tmp_path):
    tokenizer = load_tokenizer(smollm2.folder)
    assert {text: tokenizer.encode(text) for text in TEXTS} == TEXTS
    ids = torch.tensor([next(iter(TEXTS.values()))])
    read = logits(load_huggingface(smollm2.folder), ids)
    assert tokenizer.decode([int(read[0, -1].argmax())]) == " Paris"
    theirs = by_transformers(smollm2.gguf.parent, gguf_file=smollm2.gguf.name)
    torch.testing.assert_close(read, logits(theirs, ids), rtol=1e-4, atol=2e-4)
    del theirs

    losses, module = (
        Losses(),
        SFTModule(
            CheckpointModel(checkpoint=str(smollm2.folder)),
            optimizer=AdamW(lr=2e-5, weight_decay=0.0),
            schedule=Constant(),
        ),
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [losses]}
    data = ChatDataModule(
        RECORDS,
        0.0,
        template=TokenizerTemplate(),
        rows=SupervisedRows(context_length=192),
        batch_size=1,
        loading=Loading(cache_dir=str(tmp_path / "cache"), show_progress=False),
    )
    Trainer(accelerator="cpu", devices=1, max_steps=3, log_every_n_steps=1, **quiet).fit(module, datamodule=data)
    assert len(losses.seen) == 3
    assert losses.seen == sorted(losses.seen, reverse=True)

    trained = logits(module.model, ids)
    assert (trained - read).abs().max() > 0.01
    export_model(module.model, tmp_path / "trained", tokenizer)
    torch.testing.assert_close(logits(by_transformers(tmp_path / "trained"), ids), trained, rtol=1e-4, atol=2e-4)
    export_gguf(tmp_path / "trained", tmp_path / "trained.gguf", quantization="f32")
    import_gguf(tmp_path / "trained.gguf", tmp_path / "again")
    assert torch.equal(logits(load_huggingface(tmp_path / "again"), ids), trained)
    assert {text: load_tokenizer(tmp_path / "again").encode(text) for text in TEXTS} == TEXTS
