"""Exports and tokenizers over older ones: old, new or refused at every moment; every flipped bit is found."""

import functools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import threading

import pytest
import torch

from lightning_lm.errors import CheckpointError, LightningLMError
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig, export_model, load_huggingface
from lightning_lm.models.huggingface.folder import save_huggingface
from lightning_lm.models.huggingface.weights import read_tensors
from lightning_lm.storage import DIGESTS, SWITCH, check_digests, temporary_for
from lightning_lm.tokenizers import ByteTokenizer, load_tokenizer
from lightning_lm.tokenizers.bpe import BPETokenizer

LETTERS = "the cat sat on the mat and the dog sat on the log " * 4


class Killed(BaseException):
    """Stands for the end of the process: no handler of errors catches it."""


def model_of(value, dim=16):
    layer = Layer(mixer=Attention(num_heads=2), ffn=GLU())
    model = TransformerConfig(vocab_size=300, d_model=dim, num_layers=2, layers=layer).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def bpe(size):
    return BPETokenizer.train([LETTERS], size, special_tokens=["<|endoftext|>"], num_workers=1)


def stop_at(monkeypatch, number):
    """End the process, as far as its files are concerned, before its n-th change of a folder."""
    calls = iter(range(number))

    def wrap(call):
        def change(*arguments, **settings):
            if next(calls, None) is None:
                raise Killed
            return call(*arguments, **settings)

        return change

    for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))


def kill_everywhere(monkeypatch, template, work, check):
    """Run some work on copies of a folder, killed at each change of a folder: all late ones, some of the first."""
    number, step = 0, 1
    while True:
        folder = template.with_name(str(number))
        shutil.copytree(template, folder)
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            try:
                work(folder)
            except Killed:
                finished = False
            else:
                finished = True
        step = 1 if not finished and not (folder / DIGESTS).exists() else 4
        check(folder, finished)
        if finished:
            return
        number += step


def weights_of(folder):
    values = {value.item() for _, tensor in read_tensors(folder) for value in tensor.unique()}
    (value,) = values  # a mixture has two
    return value


@pytest.mark.parametrize(
    ("first", "second"),
    [(20_000, 20_000), (20_000, 10**9), (10**9, 20_000), (10**9, 10**9)],
    ids=["shards over shards", "one over shards", "shards over one", "one over one"],
)
def test_a_killed_export_leaves_old_or_new_weights(tmp_path, monkeypatch, first, second):
    transformers = pytest.importorskip("transformers")
    save_huggingface(model_of(1.0), tmp_path / "template", max_shard_bytes=first)
    new, seen = model_of(2.0), set()

    def check(folder, finished):
        value = weights_of(folder)
        assert value == 2.0 if finished else value in (1.0, 2.0)
        if finished or (value == 2.0 and value not in seen):  # also to those who know no digests
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
            assert {tensor.unique().item() for tensor in theirs.state_dict().values()} == {value}
        if value == 2.0 and not finished and value not in seen:
            save_huggingface(model_of(3.0), folder, max_shard_bytes=second)
            assert weights_of(folder) == 3.0
        seen.add(value)

    kill_everywhere(
        monkeypatch, tmp_path / "template", lambda folder: save_huggingface(new, folder, max_shard_bytes=second), check
    )
    assert seen == {1.0, 2.0}


def test_a_killed_export_of_another_model_is_never_half_of_each(tmp_path, monkeypatch):
    small, large, new, seen = bpe(270), bpe(275), model_of(2.0, dim=32), set()
    save_huggingface(model_of(1.0), tmp_path / "template", small, max_shard_bytes=20_000)

    def check(folder, finished):
        try:
            model, tokenizer = load_huggingface(folder), load_tokenizer(folder)
        except LightningLMError:
            assert not finished
            seen.add("refused")
            return
        found = model.config.d_model, tokenizer.vocab_size, next(model.parameters()).unique().item()
        assert found in ((16, 270, 1.0), (32, 275, 2.0))
        seen.add(found)

    work = functools.partial(save_huggingface, new, tokenizer=large, max_shard_bytes=20_000)
    kill_everywhere(monkeypatch, tmp_path / "template", work, check)
    assert len(seen) == 3


@pytest.mark.parametrize("replace", [lambda: bpe(275), ByteTokenizer], ids=["same kind", "other kind"])
def test_a_killed_tokenizer_is_old_new_or_refused(tmp_path, monkeypatch, replace):
    old, new = bpe(270), replace()
    old.save(tmp_path / "template")

    def check(folder, finished):
        try:
            found = load_tokenizer(folder)
        except LightningLMError:
            assert not finished
            return
        ids = found.encode(LETTERS)
        assert ids == new.encode(LETTERS) if finished else ids in (old.encode(LETTERS), new.encode(LETTERS))

    kill_everywhere(monkeypatch, tmp_path / "template", new.save, check)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_in_an_export_is_found(tmp_path):
    folder, choose = tmp_path / "model", random.Random(0)
    save_huggingface(model_of(1.0), folder, bpe(270), max_shard_bytes=20_000)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(8):
            flip(path, choose.randrange(8 * len(whole)))
            if path.name == DIGESTS:  # a name that is no name any more: its file is read, and whole
                continue
            with pytest.raises(CheckpointError, match=rf"{path.name}.* has changed since it was written.*rm "):
                load_huggingface(folder), load_tokenizer(folder)
            path.write_bytes(whole)
        path.write_bytes(whole)
    assert weights_of(folder) == 1.0


def test_sha256sum_reads_the_digests(tmp_path):
    export_model(model_of(1.0), tmp_path / "model", bpe(270))
    result = subprocess.run(["sha256sum", "--check", DIGESTS], cwd=tmp_path / "model", capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {line.split(":")[0] for line in result.stdout.splitlines()} == names - {DIGESTS}


def test_a_change_that_is_meant_is_read_after_the_remedy_or_with_the_switch(tmp_path, monkeypatch):
    save_huggingface(model_of(1.0), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=f"rm .*{DIGESTS}"):
        load_huggingface(tmp_path / "model")
    monkeypatch.setenv(SWITCH, "0")
    load_huggingface(tmp_path / "model")
    monkeypatch.delenv(SWITCH)
    (tmp_path / "model" / DIGESTS).unlink()
    load_huggingface(tmp_path / "model")


def test_models_of_transformers_are_exported_with_digests(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300, n_positions=32)
    export_model(transformers.GPT2LMHeadModel(config), tmp_path / "model", bpe(270))
    check_digests(tmp_path / "model")
    flip(tmp_path / "model" / "model.safetensors", 8 * 3000)
    with pytest.raises(CheckpointError, match="has changed"):
        check_digests(tmp_path / "model")


class Broken(ByteTokenizer):
    def save(self, path):
        raise ZeroDivisionError


def test_an_error_leaves_the_old_files_and_no_other(tmp_path):
    save_huggingface(model_of(1.0), tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    with pytest.raises(ZeroDivisionError):
        save_huggingface(model_of(2.0), tmp_path / "model", Broken())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names
    assert weights_of(tmp_path / "model") == 1.0


def test_leftovers_of_dead_processes_are_removed_and_those_of_the_living_stay(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = temporary_for(tmp_path / "model").name
    dead = mine.replace(str(os.getpid()), str(ended.pid))
    alive = mine.replace(str(os.getpid()), str(os.getppid()))
    for name in (dead, alive):
        (tmp_path / name).mkdir()
    ByteTokenizer().save(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive, "model"]


@pytest.mark.parametrize("threads", [False, True])
def test_two_exports_at_once_into_one_folder_leave_one_of_both(tmp_path, threads):
    """A model of the one with the tokenizer and all shards of the same; the moments vary from trial to trial."""
    small, large = (model_of(1.0), bpe(270)), (model_of(2.0, dim=32), bpe(275))
    for trial in range(6):
        folder = tmp_path / str(trial)
        save_huggingface(model_of(3.0), folder, bpe(280), max_shard_bytes=8_000)
        start = multiprocessing.get_context("fork").Barrier(2)

        def export(model, tokenizer, start=start, folder=folder):
            start.wait()
            save_huggingface(model, folder, tokenizer, max_shard_bytes=8_000)

        kind = threading.Thread if threads else multiprocessing.get_context("fork").Process
        exports = [kind(target=export, args=arguments) for arguments in (small, large)]
        for one in exports:
            one.start()
        for one in exports:
            one.join()
        assert threads or [one.exitcode for one in exports] == [0, 0]
        model = load_huggingface(folder)
        found = model.config.d_model, load_tokenizer(folder).vocab_size, weights_of(folder)
        assert found in ((16, 270, 1.0), (32, 275, 2.0))
        assert not [path for path in (*folder.iterdir(), *tmp_path.iterdir()) if path.name.startswith(".")]
