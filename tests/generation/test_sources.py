"""Encoder-decoders in use: sources of different lengths, samples, beams, `SampleText` and the verb ``generate``."""

import argparse
import copy

import pytest
import torch
import transformers
from lightning.pytorch import Trainer

from lightning_lm.callbacks import SampleText
from lightning_lm.cli.generate import add_arguments, run
from lightning_lm.data import SupervisedRows
from lightning_lm.datamodules import Loading, Seq2SeqDataModule
from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Generator, Sampling, beam_search, read_sources
from lightning_lm.models import load_huggingface
from lightning_lm.modules import Seq2SeqModule
from lightning_lm.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcdefgh ")
SOURCES = ["abc", "hgf edc ba", "a"]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random T5 of transformers and ours with its weights."""
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=TOKENIZER.vocab_size, **shape, dropout_rate=0.1)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    return theirs, load_huggingface(folder).eval()


def _ids(text: str) -> list[int]:
    return [*TOKENIZER.encode(text), TOKENIZER.eos_id]


def _their_beams(theirs, text: str, num_beams: int, penalty: float):
    return theirs.generate(
        torch.tensor([_ids(text)]),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=penalty if num_beams > 1 else None,
        max_new_tokens=6,
        min_length=0,
        do_sample=False,
        decoder_start_token_id=TOKENIZER.eos_id,
        eos_token_id=TOKENIZER.eos_id,
        pad_token_id=TOKENIZER.eos_id,
        output_scores=True,
        return_dict_in_generate=True,
        early_stopping="never" if num_beams > 1 else None,
    )


@pytest.mark.parametrize(("num_beams", "penalty"), [(1, 0.0), (3, 1.0), (4, 0.5)])
def test_beams_are_those_of_transformers(pair, num_beams: int, penalty: float) -> None:
    theirs, ours = pair
    model, prompts = read_sources(ours, TOKENIZER, SOURCES)
    options = {"num_beams": num_beams, "max_new_tokens": 6, "stop_ids": [TOKENIZER.eos_id], "length_penalty": penalty}
    for text, beams in zip(SOURCES, beam_search(model, prompts, **options), strict=True):
        found = _their_beams(theirs, text, num_beams, penalty)
        rows = [row[1:].tolist() for row in found.sequences]
        ends = [row.index(TOKENIZER.eos_id) + 1 if TOKENIZER.eos_id in row else 6 for row in rows]
        assert list(beams[0].token_ids) == rows[0][: ends[0]]
        if num_beams > 1:
            assert beams[0].score == pytest.approx(float(found.sequences_scores[0]), abs=1e-4)


def test_a_source_among_others_gets_what_it_gets_alone(pair) -> None:
    ours = copy.deepcopy(pair[1]).train()
    together = read_sources(ours, TOKENIZER, SOURCES)
    assert ours.training
    for sampling in (GREEDY, Sampling(temperature=1.0, seed=3)):
        options = {"sampling": sampling, "num_samples": 2, "max_new_tokens": 6}
        written = Generator(together[0], TOKENIZER).generate(together[1], **options)
        for place, text in enumerate(SOURCES):
            model, prompts = read_sources(ours, TOKENIZER, [_ids(text)])
            alone = Generator(model, TOKENIZER).generate(prompts, **options, keys=[place])
            assert [one.token_ids for one in alone] == [one.token_ids for one in written[2 * place : 2 * place + 2]]


def test_bad_sources(pair) -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        read_sources(pair[1], TOKENIZER, [])
    limit = pair[1].config.context_length
    with pytest.raises(ConfigurationError, match=f"Source 1 has {limit + 2} tokens"):
        read_sources(pair[1], TOKENIZER, ["a", "b" * (limit + 1)])


def _call(capsys, model, path, *words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--checkpoint", str(path), "--temperature", "0", "--max-new-tokens", "5", *words]
    status = run(parser.parse_args(words), lambda path: (model, TOKENIZER))
    return status, *capsys.readouterr()


def _written(model, sources) -> list[str]:
    writer, prompts = read_sources(model, TOKENIZER, sources)
    written = Generator(writer, TOKENIZER).generate(prompts, sampling=GREEDY, max_new_tokens=5)
    return [completion.text for completion in written]


def test_the_verb_writes_targets(pair, tmp_path, capsys) -> None:
    (tmp_path / "last.ckpt").touch()
    status, out, err = _call(capsys, pair[1], tmp_path / "last.ckpt", "--prompt", SOURCES[1])
    assert (status, out, err) == (0, _written(pair[1], SOURCES[1:2])[0] + "\n", "")
    words = [word for text in SOURCES for word in ("--prompt", text)]
    _, out, _ = _call(capsys, pair[1], tmp_path / "last.ckpt", *words)
    pairs = enumerate(zip(SOURCES, _written(pair[1], SOURCES), strict=True), start=1)
    assert out == "".join(f"--- prompt {number} ---\n{text}\n{target}\n" for number, (text, target) in pairs)


def test_samples_of_a_run_are_targets_of_validation_sources(pair, tmp_path, capsys) -> None:
    records = [{"prompt": f"ab {letter}c", "completion": f"{letter}h"} for letter in "defg"]
    loading = Loading(cache_dir=str(tmp_path), show_progress=False, tokenize_workers=1)
    settings = {"tokenizer": TOKENIZER, "rows": SupervisedRows(context_length=32), "batch_size": 2, "loading": loading}
    data = Seq2SeqDataModule(records, records, **settings)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    samples = SampleText(sampling=GREEDY, max_new_tokens=5)
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=1, callbacks=[samples], **quiet)
    module = Seq2SeqModule(copy.deepcopy(pair[1]))
    trainer.fit(module, datamodule=data)
    batch = next(iter(data.val_dataloader()))
    first = batch["source_ids"][0][batch["source_document_ids"][0] == 0].tolist()
    assert TOKENIZER.decode(first[:-1]) in {record["prompt"] for record in records}  # no begin token before it
    assert first[0] != TOKENIZER.eos_id
    source, target = TOKENIZER.decode(first[:-1]), _written(module.model, [first])[0]
    assert f"[{source} -> ]{target}" in capsys.readouterr().out.replace("\n", "")
