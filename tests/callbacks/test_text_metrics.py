"""Metrics of written texts: right texts for the right sources, and the numbers of sacrebleu and rouge_score."""

import warnings

import pytest
import sacrebleu
import torch
from lightning.pytorch import Trainer
from rouge_score import rouge_scorer
from torchmetrics.functional.text import sacre_bleu_score

from lightning_lm.callbacks import Perplexity, TextMetrics, text_scores
from lightning_lm.callbacks import text_metrics as file_under_test
from lightning_lm.data import SupervisedRows
from lightning_lm.datamodules import Loading, Seq2SeqDataModule
from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.models import (
    Attention,
    CrossAttention,
    EncoderDecoderConfig,
    Layer,
    RelativeBias,
    TransformerConfig,
    decoder_layers,
)
from lightning_lm.modules import PretrainModule, Seq2SeqModule
from lightning_lm.optim import AdamW, Constant
from lightning_lm.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcdefgh ")
RECORDS = [{"prompt": "ab cd ef gh"[n % 7 :], "completion": "the fed bad head"[1:][n % 5 :]} for n in range(24)]
CLEAN = [{name: text.replace("t", "a") for name, text in record.items()} for record in RECORDS]
WRITTEN = ["the cat is on the mat .", "There is a dog, he said.", ""]
WANTED = ["the cat sat on the mat .", "There was a dog, she said.", "nothing"]


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    heads = {"num_heads": 2}
    encoder = Layer(mixer=Attention(**heads, causal=False, rope=None))
    decoder = decoder_layers(attention=Attention(**heads, rope=None), cross=CrossAttention(**heads))
    return EncoderDecoderConfig(
        encoder=TransformerConfig(
            d_model=16, num_layers=1, layers=encoder, positions=RelativeBias(2, bidirectional=True)
        ),
        decoder=TransformerConfig(d_model=16, num_layers=2, layers=decoder, positions=RelativeBias(2)),
        context_length=64,
    ).build(TOKENIZER.vocab_size)


def _data(tmp_path, batch_size=2) -> Seq2SeqDataModule:
    loading = Loading(cache_dir=str(tmp_path), show_progress=False, tokenize_workers=1)
    rows = SupervisedRows(context_length=64)
    return Seq2SeqDataModule(CLEAN, CLEAN, tokenizer=TOKENIZER, rows=rows, batch_size=batch_size, loading=loading)


def _trainer(*callbacks, **settings) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), **quiet, **settings)


def _naive(model, source: list[int], begin: int, length: int) -> str:
    """The likeliest token after each other, every time from the beginning, of a source without padding."""
    ids = [begin]
    model.eval()
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([source]), torch.tensor([ids]))[0, -1]
        ids.append(int(logits[: TOKENIZER.vocab_size].argmax()))
        if ids[-1] == TOKENIZER.eos_id:
            break
    return TOKENIZER.decode([token for token in ids[1:] if token != TOKENIZER.eos_id])


@pytest.mark.parametrize("beams", [1, 2])
def test_texts_and_scores_of_a_validation(tmp_path, beams: int) -> None:
    """Greedy texts are those of a loop without cache and padding; a bound of the sources is kept."""
    metrics = TextMetrics(["bleu", "chrf", "rouge"], limit=7, max_new_tokens=6, num_beams=beams, batch_size=3)
    model, data = _model(), _data(tmp_path)
    found = _trainer(metrics).validate(Seq2SeqModule(model), datamodule=data, verbose=False)[0]
    texts, references = (list(side) for side in zip(*metrics.texts, strict=True))
    assert len(texts) == 7
    assert set(references) <= {record["completion"] for record in CLEAN}
    assert found["val/bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score, rel=1e-5)
    assert found["val/chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score, rel=1e-5)
    assert {"val/rouge1", "val/rouge2", "val/rougeL"} <= found.keys()
    if beams > 1:
        return
    batch = next(iter(data.val_dataloader()))
    examples = list(file_under_test._examples(batch, 0, 0))
    naive = [_naive(model, example.source, example.target[0], 6) for example in examples]
    assert naive[:7] == texts[: len(naive)]
    assert len(set(texts)) > 1


def test_scores_are_those_of_other_packages() -> None:
    scores = text_scores(WRITTEN, WANTED)
    assert scores["bleu"] == pytest.approx(100 * float(sacre_bleu_score(WRITTEN, [[text] for text in WANTED])))
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(WRITTEN, [WANTED]).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(WRITTEN, [WANTED]).score)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    pairs = [scorer.score(wanted, text) for text, wanted in zip(WRITTEN, WANTED, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert scores[name] == pytest.approx(100 * sum(pair[name].fmeasure for pair in pairs) / len(pairs), rel=1e-5)
    perfect = text_scores(WANTED[:2], WANTED[:2])
    assert all(score == pytest.approx(100.0) for score in perfect.values())


def test_training_is_not_changed(tmp_path) -> None:
    weights = []
    for callbacks in ([], [TextMetrics(max_new_tokens=3, limit=3)]):
        module = Seq2SeqModule(_model(), optimizer=AdamW(lr=1e-2), schedule=Constant())
        trainer = _trainer(*callbacks, max_steps=3, val_check_interval=1, limit_val_batches=1)
        trainer.fit(module, datamodule=_data(tmp_path))
        weights.append(torch.cat([value.flatten() for value in module.model.parameters()]))
    assert torch.equal(*weights)
    assert 0 <= float(trainer.callback_metrics["val/chrf"]) <= 100


def test_an_error_ends_no_fit_but_a_validation(tmp_path, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(file_under_test, "Generator", refuse)
    with pytest.raises(RuntimeError, match="no room"):
        _trainer(TextMetrics()).validate(Seq2SeqModule(_model()), datamodule=_data(tmp_path), verbose=False)
    trainer = _trainer(TextMetrics(), max_steps=2, val_check_interval=1, limit_val_batches=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(Seq2SeqModule(_model()), datamodule=_data(tmp_path))
    assert sum("TextMetrics measures nothing more in this run" in str(entry.message) for entry in said) == 1
    assert trainer.global_step == 2


def test_refusals(monkeypatch, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"\['meteor'\] must be a list of bleu, chrf, rouge"):
        TextMetrics(["meteor"])
    with pytest.raises(ConfigurationError, match="must be a list"):
        TextMetrics("bleu")
    with pytest.raises(ConfigurationError, match="limit"):
        TextMetrics(limit=0)
    decoder = TransformerConfig(d_model=16, num_layers=1, context_length=64, layers=Layer(mixer=Attention(num_heads=2)))
    with pytest.raises(ConfigurationError, match=r"of PretrainModule, Transformer, has no given\(source_ids\)"):
        _trainer(TextMetrics(), Perplexity()).validate(
            PretrainModule(decoder), datamodule=_data(tmp_path), verbose=False
        )
    monkeypatch.setattr(file_under_test.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'sacrebleu.*pip install "lightning-lm\[evals\]"'):
        TextMetrics(["chrf"])
    assert text_scores(["a b"], ["a b"], ["rouge"])["rougeL"] == pytest.approx(100.0)
