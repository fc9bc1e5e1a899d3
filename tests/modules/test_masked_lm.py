"""Masked language models and encoder-decoders in a Trainer: exact losses, whatever the batches, and refusals."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from lightning_lm.data.objectives import MASK, SENTINELS
from lightning_lm.datamodules import (
    DenoisingDataModule,
    Loading,
    MaskedTextDataModule,
    PrefixTextDataModule,
    Seq2SeqDataModule,
)
from lightning_lm.errors import ConfigurationError
from lightning_lm.models import (
    MLP,
    Attention,
    CrossAttention,
    EncoderConfig,
    EncoderDecoderConfig,
    Layer,
    PredictionHead,
    RelativeBias,
    TransformerConfig,
    decoder_layers,
)
from lightning_lm.modules import CrossEntropy, MaskedLMModule, PretrainModule, Seq2SeqModule
from lightning_lm.optim import SGD, Constant
from lightning_lm.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer(("<|endoftext|>", MASK, *SENTINELS))
TEXTS = [f"the quick brown fox jumps over lazy dog number {n}" * (1 + n % 3) for n in range(20)]
ENCODER = EncoderConfig(
    d_model=16,
    num_layers=2,
    context_length=48,
    layers=Layer(mixer=Attention(num_heads=2, causal=False)),
    prediction=PredictionHead(),
)
SEQ2SEQ = EncoderDecoderConfig(
    encoder=TransformerConfig(
        d_model=16,
        num_layers=1,
        layers=Layer(mixer=Attention(num_heads=2, causal=False, rope=None), ffn=MLP()),
        positions=RelativeBias(2, bidirectional=True),
    ),
    decoder=TransformerConfig(
        d_model=16,
        num_layers=2,
        layers=decoder_layers(attention=Attention(num_heads=2, rope=None), cross=CrossAttention(num_heads=2)),
        positions=RelativeBias(2),
    ),
    context_length=48,
)


def _trainer(steps: int = 2, **settings) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=1, log_every_n_steps=1, **quiet, **settings)


def _data(kind, tmp_path, texts=TEXTS, **settings):
    loading = Loading(cache_dir=str(tmp_path), show_progress=False, tokenize_workers=1)
    return kind(texts, 0.2, tokenizer=TOKENIZER, context_length=48, batch_size=4, loading=loading, **settings)


def _weights(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.model.named_parameters()}


def test_only_hidden_tokens_are_predicted_at_their_own_places(tmp_path) -> None:
    data = _data(MaskedTextDataModule, tmp_path)
    module = MaskedLMModule(ENCODER)
    _trainer(1).fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    loss = module.training_loss(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = module.model(**inputs).double()
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=-100)
    assert loss.loss_sum.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert int(loss.num_tokens) == int((batch["labels"] != -100).sum()) > 0


@pytest.mark.parametrize("kind", ["masked", "seq2seq", "prefix"])
def test_micro_batches_change_nothing(tmp_path, kind: str) -> None:
    """Targets are unequally many in the micro-batches; the gradient is that of the whole step nevertheless."""
    make, config, source = {
        "masked": (MaskedLMModule, ENCODER, MaskedTextDataModule),
        "seq2seq": (Seq2SeqModule, SEQ2SEQ, DenoisingDataModule),
        "prefix": (
            PretrainModule,
            TransformerConfig(d_model=16, num_layers=1, context_length=48),
            PrefixTextDataModule,
        ),
    }[kind]
    torch.manual_seed(0)
    model = config.build(TOKENIZER.vocab_size)
    found = []
    for micro_batches in (1, 4):
        module = make(copy.deepcopy(model), optimizer=SGD(lr=1.0, momentum=0.0), schedule=Constant())
        _trainer(2, accumulate_grad_batches=micro_batches).fit(module, datamodule=_data(source, tmp_path))
        found.append(_weights(module))
    assert all(torch.allclose(found[0][name], found[1][name], atol=2e-5) for name in found[0])
    assert any(not torch.equal(found[0][name], dict(model.named_parameters())[name]) for name in found[0])


def test_label_smoothing_of_targets(tmp_path) -> None:
    data = _data(DenoisingDataModule, tmp_path)
    module = Seq2SeqModule(SEQ2SEQ, loss=CrossEntropy(label_smoothing=0.1))
    _trainer(1).fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    names = ("source_ids", "input_ids")
    extra = {name: batch[name] for name in ("source_document_ids", "document_ids")}
    logits = module.model(*(batch[name] for name in names), **extra)[:, :-1]
    wanted = F.cross_entropy(
        logits.flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), reduction="sum", label_smoothing=0.1
    )
    assert module.training_loss(batch).loss_sum.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_records_of_prompts_and_completions_are_sources_and_targets(tmp_path) -> None:
    records = [{"prompt": f"say {n}: ", "completion": f"{n} {n}"} for n in range(16)]
    loading = Loading(cache_dir=str(tmp_path), show_progress=False, tokenize_workers=1)
    data = Seq2SeqDataModule(records, 0.25, tokenizer=TOKENIZER, batch_size=2, loading=loading)
    module = Seq2SeqModule(EncoderDecoderConfig(encoder=SEQ2SEQ.encoder, decoder=SEQ2SEQ.decoder))
    _trainer(1).fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    pairs = set()
    for row in range(2):
        for number in range(int(batch["document_ids"][row].max())):
            source = batch["source_ids"][row][batch["source_document_ids"][row] == number]
            target = batch["input_ids"][row][batch["document_ids"][row] == number]
            pairs.add((TOKENIZER.decode(source), TOKENIZER.decode(target)))
    end = "<|endoftext|>"
    texts = {(source.replace(end, ""), target.replace(end, "")) for source, target in pairs}
    assert texts <= {(record["prompt"], record["completion"]) for record in records}
    assert len(texts) > 3


def test_a_causal_model_has_nothing_to_hide(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="every layer of the model is causal"):
        _trainer().fit(
            MaskedLMModule(TransformerConfig(d_model=16, num_layers=1)),
            datamodule=_data(MaskedTextDataModule, tmp_path),
        )


def test_an_encoder_cannot_predict_next_tokens(tmp_path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"PretrainModule trains on the next token.*causal=False.*MaskedLMModule"
    ):
        _trainer().fit(PretrainModule(ENCODER), datamodule=_data(PrefixTextDataModule, tmp_path))


def test_sources_need_a_model_that_reads_them(tmp_path) -> None:
    model = TransformerConfig(d_model=16, num_layers=1, context_length=48)
    with pytest.raises(ConfigurationError, match=r"given\(source_ids\), and Transformer has none"):
        _trainer().fit(Seq2SeqModule(model), datamodule=_data(DenoisingDataModule, tmp_path))


def test_a_checkpoint_resumes_with_the_masks_of_the_whole_run(tmp_path) -> None:
    whole = MaskedLMModule(ENCODER, schedule=Constant())
    torch.manual_seed(0)
    _trainer(4).fit(whole, datamodule=_data(MaskedTextDataModule, tmp_path))
    torch.manual_seed(0)
    first = MaskedLMModule(ENCODER, schedule=Constant())
    trainer = _trainer(2)
    trainer.fit(first, datamodule=_data(MaskedTextDataModule, tmp_path))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = MaskedLMModule(ENCODER, schedule=Constant())
    _trainer(4).fit(rest, datamodule=_data(MaskedTextDataModule, tmp_path), ckpt_path=tmp_path / "half.ckpt")
    wanted, found = _weights(whole), _weights(rest)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    loaded = MaskedLMModule.load_from_checkpoint(tmp_path / "half.ckpt", weights_only=True)
    assert type(loaded.model).__name__ == "Encoder"
    assert np.isfinite(float(loaded.model.head.bias.sum()))
