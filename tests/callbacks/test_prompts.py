"""Prompts of samples and of the commands at the end of a run are of the kind of the data."""

from types import SimpleNamespace

import pytest
import torch

from lightning_lm.callbacks.formatting import number
from lightning_lm.callbacks.prompts import Prompt, sample_prompts


class Tokenizer:
    """Letters, and two special tokens."""

    @property
    def special_tokens(self):
        return {"<s>": 0, "<user>": 1}

    def decode(self, ids):
        return "".join({0: "<s>", 1: "<user>"}.get(id_, chr(id_)) for id_ in ids)


def prompts_of(**datamodule):
    return sample_prompts(SimpleNamespace(datamodule=SimpleNamespace(**datamodule)), Tokenizer())


def rows(*texts):
    ids = torch.tensor([[0, *map(ord, text)] for text in texts])
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def test_the_prompts_of_examples_come_first():
    found = prompts_of(val_dataloader=lambda: [rows("12=21", "34=43")], validation_texts=lambda: ["not these"])
    assert found == [Prompt("12="), Prompt("34=")]
    assert prompts_of(val_dataloader=lambda: [{"texts": ["what?", "how?", "who?"]}]) == [
        Prompt("what?"),
        Prompt("how?"),
    ]


def test_special_tokens_inside_stay_tokens():
    batch = rows("12=21")
    batch["input_ids"][0, 1] = 1
    assert prompts_of(val_dataloader=lambda: [batch]) == [Prompt("<user>2=", [0, 1, ord("2"), ord("=")])]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("\n\ndef main():\n    pass", "def main():"),
        ("Once upon a time there was a small fox", "Once upon a time there"),
        ("x" * 50, "x" * 24),
    ],
)
def test_running_text_gives_its_beginning(text, prompt):
    whole = {"input_ids": torch.ones(1, 4), "labels": torch.ones(1, 4)}
    assert prompts_of(val_dataloader=lambda: [whole], validation_texts=lambda: ["", text]) == [Prompt(prompt)]


def test_without_any_data_there_is_a_prompt():
    assert prompts_of() == [Prompt("The ")]
    assert sample_prompts(SimpleNamespace(datamodule=None), None) == [Prompt("The ")]


def test_numbers_have_as_many_digits_as_matter():
    assert [number(x) for x in (float("nan"), float("inf"), 0.0, -1.5, 1e-9)] == ["nan", "inf", "0", "-1.5000", "1e-09"]
