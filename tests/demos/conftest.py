"""The warm start that the demonstrations of every objective share, made by the recipe as a user would make it."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lm.cli import main
from lightning_lm.generation import Generator, Sampling
from lightning_lm.modules import load_model

CHECKPOINT = "runs/{}/version_0/checkpoints/last.ckpt"


class Demo(NamedTuple):
    """What a recipe left behind."""

    checkpoint: Path
    accuracy: float
    """Share of held-out numbers that greedy decoding reverses, counted here and not by the run; NaN for a judge."""
    curves: dict[str, list[float]]


def held_out(count: int = 1000) -> list[str]:
    """Numbers that no recipe trains on: the definition of `ReverseDigits`, written down again."""
    generator, found = random.Random(7), []
    while len(found) < count:
        number = "".join(generator.choices("0123456789", k=5))
        if number != number[::-1] and random.Random(number).random() < 0.1:
            found.append(number)
    return found


def accuracy_of(checkpoint: Path) -> float:
    model, tokenizer = load_model(checkpoint)
    numbers = held_out()
    prompts = [[tokenizer.eos_id, *tokenizer.encode(f"{number}=")] for number in numbers]
    answers = Generator(model, tokenizer).generate(prompts, sampling=Sampling(temperature=0.0), max_new_tokens=7)
    right = [
        answer.text == number[::-1] and answer.finish_reason == "eos"
        for answer, number in zip(answers, numbers, strict=True)
    ]
    return sum(right) / len(right)


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Fine-tune on noisy demonstrations, about 25 seconds of CPU; the folder holds ``runs``."""
    folder = tmp_path_factory.mktemp("demos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["--config", "sft/reverse", "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0"]
        assert main(["fit", *words]) == 0
    checkpoint = folder / CHECKPOINT.format("sft_reverse")
    return Demo(checkpoint, accuracy_of(checkpoint), {})


@pytest.fixture
def run_demo(warm_start: Demo, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Demo]:
    """Run a recipe where the warm start lies."""

    def run(recipe: str, name: str, *words: str, answers: bool = True) -> Demo:
        folder = warm_start.checkpoint.parents[4]
        monkeypatch.chdir(folder)
        assert main(["fit", "--config", recipe, "--trainer.accelerator", "cpu", *words]) == 0
        checkpoint = folder / CHECKPOINT.format(name)
        events = EventAccumulator(str(checkpoint.parents[1]), size_guidance={"scalars": 0})
        events.Reload()
        curves = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        return Demo(checkpoint, accuracy_of(checkpoint) if answers else math.nan, curves)

    return run
