"""Masked language models and encoder-decoders on two ranks: the weights and the texts are those of one process."""

import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision
from split_runs import STRATEGIES, trainer_for, weights_of

from lightning_lm.callbacks import TextMetrics
from lightning_lm.data.objectives import MASK, SENTINELS
from lightning_lm.datamodules import DenoisingDataModule, Loading, MaskedTextDataModule
from lightning_lm.models import (
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
from lightning_lm.modules import MaskedLMModule, Seq2SeqModule
from lightning_lm.optim import SGD, Constant
from lightning_lm.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer(("<|endoftext|>", MASK, *SENTINELS))
TEXTS = [f"the quick brown fox jumps over lazy dog number {n}" * (1 + n % 3) for n in range(24)]
HEADS = {"num_heads": 2}
READER = Layer(mixer=Attention(**HEADS, causal=False, rope=None))
ENCODER = EncoderConfig(
    d_model=16, num_layers=1, context_length=48, layers=READER, positions=None, prediction=PredictionHead()
)
SEQ2SEQ = EncoderDecoderConfig(
    encoder=TransformerConfig(d_model=16, num_layers=1, layers=READER, positions=RelativeBias(2, bidirectional=True)),
    decoder=TransformerConfig(
        d_model=16,
        num_layers=2,
        layers=decoder_layers(attention=Attention(**HEADS, rope=None), cross=CrossAttention(**HEADS)),
        positions=RelativeBias(2),
    ),
    context_length=48,
)
KINDS = {
    "masked": (MaskedLMModule, ENCODER, MaskedTextDataModule),
    "seq2seq": (Seq2SeqModule, SEQ2SEQ, DenoisingDataModule),
}


def trained(strategy, kind, folder):
    """Return the weights after two steps, and what was written to validation sources and its scores."""
    make, config, source = KINDS[kind]
    torch.manual_seed(0)
    module = make(config, optimizer=SGD(lr=0.5, momentum=0.0), schedule=Constant())
    loading = Loading(cache_dir=folder, show_progress=False, tokenize_workers=1)
    data = source(TEXTS, 0.3, tokenizer=TOKENIZER, context_length=48, batch_size=4, loading=loading)
    written = TextMetrics(limit=5, max_new_tokens=4)
    callbacks = [written] if kind == "seq2seq" else []
    trainer = trainer_for(
        STRATEGIES[strategy](), max_steps=2, val_check_interval=2, plugins=[DoublePrecision()], callbacks=callbacks
    )
    trainer.fit(module, datamodule=data)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return weights_of(module), written.texts, scores


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_texts_are_those_of_one_process(ranks, tmp_path, kind):
    weights, texts, scores = trained("one", kind, str(tmp_path))
    assert len(texts) == (5 if kind == "seq2seq" else 0)
    for found, found_texts, found_scores in ranks(2).run(trained, "ddp", kind, str(tmp_path)):
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-8)
        assert found_texts == texts
        assert found_scores == pytest.approx(scores, rel=1e-5)
