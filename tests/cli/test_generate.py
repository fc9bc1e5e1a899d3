"""The verb ``generate``, with a real model and tokenizer behind a loader of the test."""

import argparse
import io

import pytest
import torch
from tokenizers import Tokenizer, models, processors

from lightning_lm.cli import main
from lightning_lm.cli.generate import add_arguments, run
from lightning_lm.errors import CheckpointError
from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.models.huggingface.folder import save_huggingface
from lightning_lm.tokenizers import load_tokenizer
from lightning_lm.tokenizers.simple import ByteTokenizer


def tiny_model(vocab_size=300):
    torch.manual_seed(0)
    layers = Layer(mixer=Attention(num_heads=2))
    return TransformerConfig(vocab_size=vocab_size, d_model=16, num_layers=1, layers=layers).build().eval()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    path.touch()
    return path


def call(capsys, *words, model=None, tokenizer="bytes"):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    loaded = (model or tiny_model(), ByteTokenizer() if tokenizer == "bytes" else tokenizer)
    status = run(parser.parse_args([str(word) for word in words]), lambda path: loaded)
    out, err = capsys.readouterr()
    return status, out, err


def expected(prompts, *, num_samples=1, stop_strings=(), sampling):
    completions = Generator(tiny_model(), ByteTokenizer()).generate(
        prompts, sampling=sampling, max_new_tokens=12, num_samples=num_samples, stop_strings=stop_strings
    )
    return [completion.text for completion in completions]


OPTIONS = ("--seed", 1, "--top-k", 40, "--top-p", 0.95, "--min-p", 0.01, "--max-new-tokens", 12)
SAMPLING = Sampling(temperature=0.8, seed=1, top_k=40, top_p=0.95, min_p=0.01)


def test_one_prompt_is_continued(capsys, checkpoint):
    status, out, err = call(capsys, "--checkpoint", checkpoint, "--prompt", "def ", *OPTIONS)
    assert (status, err) == (0, "")
    assert out == "def " + expected(["def "], sampling=SAMPLING)[0] + "\n"


def test_the_prompt_may_come_from_standard_input(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def "))
    _, out, _ = call(capsys, "--checkpoint", checkpoint, "--prompt", "-", *OPTIONS)
    assert out == "def " + expected(["def "], sampling=SAMPLING)[0] + "\n"


def test_without_a_prompt_a_document_begins(capsys, checkpoint):
    status, out, _ = call(capsys, "--checkpoint", checkpoint, *OPTIONS)
    assert (status, out) == (0, expected([""], sampling=SAMPLING)[0] + "\n")


def test_several_prompts_and_samples_have_titles(capsys, checkpoint):
    words = ("--prompt", "a", "--prompt", "b", "--num-samples", 2)
    _, out, _ = call(capsys, "--checkpoint", checkpoint, *words, *OPTIONS)
    texts = expected(["a", "b"], num_samples=2, sampling=SAMPLING)
    titles = [f"--- prompt {i}, sample {j} ---" for i in (1, 2) for j in (1, 2)]
    assert out == "".join(f"{t}\n{p}{x}\n" for t, p, x in zip(titles, "aabb", texts, strict=True))


def test_a_chat_is_written_by_the_template_and_special_tokens_count(capsys, checkpoint, tmp_path):
    tokenizer = ByteTokenizer(("<|endoftext|>", "<|im_end|>")).with_chat_template(
        "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}{{ 'bot' }}"
    )
    turns = tmp_path / "turns.json"
    turns.write_text('[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]')
    ids = tokenizer.encode("systems<|im_end|>userx<|im_end|>assistanty<|im_end|>usera<|im_end|>bot", allow_special=True)
    generator = Generator(tiny_model(), tokenizer)
    (chat,) = generator.generate([ids], sampling=Sampling(temperature=0), max_new_tokens=9)
    words = ("--checkpoint", checkpoint, "--prompt", "a", "--temperature", 0, "--max-new-tokens", 9)
    chatting = ("--chat", "--system", "s", "--messages", turns)
    status, out, err = call(capsys, *words, *chatting, tokenizer=tokenizer)
    assert (status, err, out) == (0, "", "a" + chat.text + "\n")
    status, _, err = call(capsys, *words, "--chat")
    assert status == 1
    assert "--data.template ChatML" in err


def test_stop_strings_end_the_text(capsys, checkpoint):
    (text,) = expected(["a"], sampling=Sampling(temperature=0))
    stop = text[3:5]
    words = ("--prompt", "a", "--temperature", 0, "--stop", "never comes", "--stop", stop, "--max-new-tokens", 12)
    _, out, _ = call(capsys, "--checkpoint", checkpoint, *words)
    assert out == "a" + text[: text.index(stop)] + "\n"


def test_a_terminal_does_not_obey_the_model(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, out, _ = call(capsys, "--checkpoint", checkpoint, "--prompt", "\x1b[2J\ttab", *OPTIONS)
    assert out.startswith("�[2J\ttab")
    assert "\x1b" not in out


class TestHuggingFaceFolder:
    def folder(self, tmp_path):
        save_huggingface(tiny_model(vocab_size=8), tmp_path)
        vocab = {letter: index for index, letter in enumerate("abcdefg")} | {"<s>": 7}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.add_special_tokens(["<s>"])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 7)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    def test_is_continued_behind_the_mark_that_its_tokenizer_puts_first(self, capsys, tmp_path):
        folder = self.folder(tmp_path)
        words = ("generate", "--checkpoint", folder, "--prompt", "abc", "--seed", 0, "--max-new-tokens", 9)
        assert main([str(word) for word in words]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        generator = Generator(tiny_model(vocab_size=8), load_tokenizer(folder))
        (completion,) = generator.generate([[7, 0, 1, 2]], sampling=Sampling(temperature=0.8, seed=0), max_new_tokens=9)
        assert out == "abc" + completion.text + "\n"

    def test_without_a_tokenizer_asks_for_one(self, capsys, tmp_path):
        folder = self.folder(tmp_path)
        (folder / "tokenizer.json").unlink()
        assert main(["generate", "--checkpoint", str(folder)]) == 1
        assert "--tokenizer PATH" in capsys.readouterr().err


class TestErrors:
    """Each is one line on stderr and status 1."""

    def message(self, capsys, *words, **loaded):
        status, out, err = call(capsys, *words, **loaded)
        assert (status, out, err.count("\n")) == (1, "", 1)
        return err

    def test_no_such_file(self, capsys, tmp_path):
        assert "no checkpoint at" in self.message(capsys, "--checkpoint", tmp_path / "none.ckpt")

    def test_a_folder_of_something_else_names_the_checkpoint_in_it(self, capsys, checkpoint):
        assert f"Did you mean {checkpoint}?" in self.message(capsys, "--checkpoint", checkpoint.parent)

    def test_the_parts_of_a_sharded_run(self, capsys, tmp_path):
        (tmp_path / "meta.pt").write_bytes(b"")
        assert f"lightning-lm consolidate {tmp_path}, " in self.message(capsys, "--checkpoint", tmp_path)

    def test_no_tokenizer(self, capsys, checkpoint):
        assert "--tokenizer PATH" in self.message(capsys, "--checkpoint", checkpoint, tokenizer=None)

    def test_another_tokenizer(self, capsys, checkpoint):
        message = self.message(capsys, "--checkpoint", checkpoint, model=tiny_model(vocab_size=100))
        assert "the model knows 100" in message

    def test_no_tokenizer_at_the_path(self, capsys, checkpoint, tmp_path):
        assert "no tokenizer" in self.message(capsys, "--checkpoint", checkpoint, "--tokenizer", tmp_path / "none")

    def test_a_setting_out_of_range(self, capsys, checkpoint):
        with pytest.raises(SystemExit):
            call(capsys, "--checkpoint", checkpoint, "--top-p", 0)
        assert "argument --top-p: 0 must be above 0 and at most 1" in capsys.readouterr().err

    @pytest.mark.parametrize("error", [CheckpointError("last.ckpt is truncated."), OSError(22, "Invalid argument")])
    def test_what_the_loader_says(self, capsys, checkpoint, error):
        parser = argparse.ArgumentParser()
        add_arguments(parser)

        def truncated(path):
            raise error

        assert run(parser.parse_args(["--checkpoint", str(checkpoint)]), truncated) == 1
        message = capsys.readouterr().err
        assert message.startswith("lightning-lm generate: ")
        assert "last.ckpt" in message
        assert "truncated" in message


def test_a_saved_tokenizer_replaces_the_one_of_the_checkpoint(capsys, checkpoint, tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer")
    words = ("--prompt", "def ", "--tokenizer", tmp_path / "tokenizer", *OPTIONS)
    status, out, _ = call(capsys, "--checkpoint", checkpoint, *words, tokenizer=None)
    assert (status, out) == (0, "def " + expected(["def "], sampling=SAMPLING)[0] + "\n")
