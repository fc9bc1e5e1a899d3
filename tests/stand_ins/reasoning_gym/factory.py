"""Tasks with names, settings and habits of Reasoning Gym's: seeds that overlap, verifiers that raise or evaluate."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from types import SimpleNamespace
from typing import ClassVar


@dataclass
class Config:
    seed: int | None = None
    size: int = 500


@dataclass
class ChainSumConfig(Config):
    min_terms: int = 2
    max_terms: int = 6
    min_digits: int = 1
    max_digits: int = 4

    def validate(self):
        assert self.max_terms >= self.min_terms, "max_terms must be >= min_terms"


class TaskType(StrEnum):
    SIBLINGS = "siblings"
    FRIENDS = "friends"


@dataclass
class AIWConfig(Config):
    task_types: list = field(default_factory=lambda: list(TaskType))
    task_type_weights: list = field(default_factory=lambda: [0.5, 0.5])
    max_entities: int = 900


class Dataset:
    def __init__(self, config):
        self.config = config

    def __getitem__(self, index):
        question, answer = self.make(Random(self.config.seed + index))
        return {"question": question, "answer": str(answer), "metadata": {"pair": (1, 2)}}

    def score_answer(self, answer, entry):
        right = entry["answer"]
        return 1.0 if answer == right else len(right) / len(answer) if right in answer else 0.0


class ChainSum(Dataset):
    def make(self, random):
        config = self.config
        digits = random.randint(config.min_digits, config.max_digits)
        terms = random.choices(
            range(10 ** (digits - 1), 10**digits), k=random.randint(config.min_terms, config.max_terms)
        )
        return f"State the final answer to the following arithmetic problem: {' + '.join(map(str, terms))} =", sum(
            terms
        )


class GCD(Dataset):
    def make(self, random):
        pair = random.randint(2, 900), random.randint(2, 900)
        return f"Find the Greatest Common Divisor (GCD) of these numbers: {pair[0]}, {pair[1]}.", math.gcd(*pair)


class AIW(Dataset):
    def make(self, random):
        kind = random.choices(self.config.task_types, self.config.task_type_weights)[0]
        sisters = random.randint(1, self.config.max_entities)
        name = f"Alice {random.randint(1, 999)}"
        return f"{name} has {sisters} sisters. How many {kind.value} does her brother have?", sisters + 1


class CoinFlip(Dataset):
    def make(self, random):
        return f"What is the probability of getting exactly {random.randint(1, 40)} heads in 40 fair coin flips?", 0.5


class PrimeFactorization(Dataset):
    def make(self, random):
        prime = random.choice([p for p in range(2, 997) if all(p % d for d in range(2, p))])
        return f"Find the prime factorization of {prime}.", prime

    def score_answer(self, answer, entry):
        return float(int(answer) == int(entry["answer"]))


class Queens(Dataset):
    def make(self, random):
        return f"Place the queens, number {random.random()}.", "_ Q"

    def score_answer(self, answer, entry):
        try:
            return float(answer == entry["answer"] or eval(answer) == entry["answer"])
        except (NameError, SyntaxError, TypeError, OSError, MemoryError):
            return 0.0


DATASETS = {
    "acre": (GCD, Config),
    "aiw": (AIW, AIWConfig),
    "chain_sum": (ChainSum, ChainSumConfig),
    "coin_flip": (CoinFlip, Config),
    "composite": (GCD, Config),
    "gcd": (GCD, Config),
    "n_queens": (Queens, Config),
    "prime_factorization": (PrimeFactorization, Config),
    "word_ladder": (GCD, Config),
}


class ChainSumCurriculum:
    attributes: ClassVar = {
        "num_terms": SimpleNamespace(levels=range(2, 13)),
        "num_digits": SimpleNamespace(levels=range(1, 11)),
    }

    def set_global_level(self, level):
        self.level = level

    def generate_configuration(self, defaults):
        return ChainSumConfig(max_terms=2 + self.level, max_digits=1 + min(self.level, 9), **defaults)


def create_dataset(name, **settings):
    dataset, config = DATASETS[name]
    made = config(**settings)
    if hasattr(made, "validate"):
        made.validate()
    return dataset(made)


def has_curriculum(name):
    return name == "chain_sum"


def create_curriculum(name):
    return ChainSumCurriculum()
