"""Questions that are answered by a completion, one or several for each."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals.pass_at import pass_at
from lightning_lm.evals.reasoning import ChainOfThought
from lightning_lm.evals.requests import Completions, Generation, Prompt
from lightning_lm.evals.task import Answer, Item
from lightning_lm.evals.tasks.record_task import Fields, RecordTask
from lightning_lm.evals.tasks.template import evaluate_expression, render_record
from lightning_lm.evals.tasks.verdicts import AnswerCheck, Check, Verdict
from lightning_lm.evals.voting import best_of, majority_at, powers_of_two, vote_weights, weighted_vote
from lightning_lm.generation import Sampling
from lightning_lm.parts import Limit
from lightning_lm.rewards import Reward

__all__ = ["GenerationTask", "Vote"]

Vote = Literal["none", "majority", "weighted", "best"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationTask(RecordTask, limits={"max_new_tokens": Limit.COUNT, "num_samples": Limit.COUNT}):
    """Questions that are answered by a completion.

    Each check gives a metric with its name, the fraction of right completions. With several completions it also gives
    ``NAME_pass@k`` (one of ``k`` is right), ``NAME_maj@k`` (majority of the answers) and, if there is a ranking,
    ``NAME_best@k`` and ``NAME_weighted@n``; all but the last are exact averages over subsets. ``tokens`` is the mean
    number of tokens of a completion.

    Args:
        answer: Expression of the right answer, a text or a list of texts, one of which is enough.
        solution: Template of the answer in examples; by default the right answer.
        checks: Ways to tell whether a completion is right, by the name of the metric.
        stop: Texts that end a completion.
        max_new_tokens: Most tokens of a completion.
        num_samples: Completions of each question.
        sampling: Sampling settings; the default is greedy for one completion, and temperature 0.7 with
            the seed of the evaluation for several.
        ranking: Reward that ranks the completions of a question and weighs their votes, such as a reward model. It is
            not given the right answer.
        reasoning: Reasoning before the answer, which alone is checked; by default the model answers at once.
        vote: The metric that stands for the task: of single completions, or of all of them with a ``majority`` vote, a
            vote ``weighted`` by the ranking, or the ``best`` by the ranking.
    """

    answer: str = "answer"
    solution: str = ""
    checks: Mapping[str, Check] = dataclasses.field(default_factory=lambda: {"exact_match": AnswerCheck()})
    stop: tuple[str, ...] = ("\n\n",)
    max_new_tokens: int = 256
    num_samples: int = 1
    sampling: Sampling | None = None
    ranking: Reward | None = None
    reasoning: ChainOfThought | None = None
    vote: Vote = "none"

    answer_cue: ClassVar[str] = "\nTherefore, the answer is"
    """Text between reasoning and answer."""
    checks_cue: ClassVar[bool] = False
    """True if the checks look for the cue before the answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checks:
            raise ConfigurationError(f"The task {self.name!r} has no checks; give at least one, with a name.")
        if self.vote not in get_args(Vote):
            raise ConfigurationError(f"There is no vote {self.vote!r}; write one of {', '.join(get_args(Vote))}.")
        if self.vote in ("majority", "weighted") and not next(iter(self.checks.values())).has_answers:
            raise ConfigurationError(
                f"vote={self.vote} counts equal answers, and the checks of {self.name!r} have none; use vote=best."
            )
        if self.vote in ("weighted", "best") and self.ranking is None:
            raise ConfigurationError(f"vote={self.vote} needs a ranking: the reward that scores the completions.")
        if self.vote != "none" and self.num_samples < 2:
            raise ConfigurationError(f"vote={self.vote} needs several completions of a question: num_samples=8.")
        if self.num_samples > 1 and self.sampling is not None and self.sampling.temperature == 0:
            raise ConfigurationError("Greedy completions of a question are all the same; use a temperature above 0.")

    @property
    def main_metric(self) -> str:
        """Name of the first check, or its vote over all completions."""
        name = next(iter(self.checks))
        kinds = {"none": name, "majority": f"{name}_maj", "weighted": f"{name}_weighted", "best": f"{name}_best"}
        return kinds[self.vote] if self.vote == "none" else f"{kinds[self.vote]}@{self.num_samples}"

    def item(self, fields: Fields, prompt: Prompt) -> Item:
        """Return the item of a record."""
        reasoning = self.reasoning
        if reasoning is not None:
            prompt = dataclasses.replace(prompt, begun=reasoning.cue)
            cue = self.answer_cue if reasoning.answer is None else reasoning.answer
            reasoning = dataclasses.replace(reasoning, answer=cue)
        request = Generation(
            prompt,
            stop=self.stop,
            max_new_tokens=self.max_new_tokens,
            num_samples=self.num_samples,
            sampling=self.sampling or Sampling(temperature=0.0 if self.num_samples == 1 else 0.7),
            reasoning=reasoning,
        )
        return Item(id="", requests=(request,), gold=self.gold_of(fields))

    def searched_text(self, fields: Fields) -> str:
        """Return the values in the question, and the right answer."""
        return f"{super().searched_text(fields)} {_first(self.gold_of(fields))}"

    def gold_of(self, fields: Fields) -> Any:
        """Return the right answer of a record: a text or several.

        Args:
            fields: Fields of the record.

        Raises:
            DataError: If there is none.
        """
        gold = evaluate_expression(self.answer, fields, "answer")
        if gold is None or gold == "" or gold == []:
            raise DataError(f"answer={self.answer!r} is empty; repair the record, or use a split with answers.")
        return [str(each) for each in gold] if isinstance(gold, list | tuple) else str(gold)

    def shot_answer(self, fields: Fields) -> str:
        """Return the solution, or the right answer."""
        return render_record(self.solution, fields, "solution") if self.solution else _first(self.gold_of(fields))

    def completed(self, item: Item, text: str) -> str:  # noqa: ARG002
        """Return what is checked of a completion; by default all of it.

        Args:
            item: The question.
            text: The completion.
        """
        return text

    def score(self, item: Item, answers: Sequence[Answer]) -> Mapping[str, float]:
        """Return the metrics of an item; a ranking sees the reasoning, checks see the answer."""
        (answer,) = answers
        assert isinstance(answer, Completions)
        (request,) = item.requests
        assert isinstance(request, Generation)
        prompt = request.prompt.text
        ranks = self._ranks([self.completed(item, text) for text in answer.texts], prompt)
        texts = [self.completed(item, text) for text in self.answers_only(request, answer.texts)]
        metrics: dict[str, float] = {}
        for name, check in self.checks.items():
            metrics |= sampled_metrics(name, check(texts, item.gold, prompt), ranks, votes=check.has_answers)
        return {**metrics, "tokens": math.fsum(answer.num_tokens) / len(answer.num_tokens)}

    def answers_only(self, request: Generation, texts: Sequence[str]) -> list[str]:
        """Return the answers of completions, without the reasoning before them.

        Args:
            request: The request.
            texts: Its completions.
        """
        cue = request.reasoning.answer if request.reasoning else None
        if not cue:
            return list(texts)
        return [(cue if self.checks_cue else "") + text.rpartition(cue)[2] for text in texts]

    def _ranks(self, texts: Sequence[str], prompt: str) -> list[float] | None:
        if self.ranking is None or len(texts) < 2:
            return None
        scores = self.ranking(prompts=[prompt] * len(texts), completions=texts)
        return [-math.inf if score is None else float(score) for score in scores]


def sampled_metrics(
    name: str, verdicts: Sequence[Verdict], ranks: Sequence[float] | None = None, *, votes: bool = True
) -> dict[str, float]:
    """Return the metrics of the completions of one question.

    Args:
        name: Name of the check.
        verdicts: Verdict on each completion.
        ranks: Score of each by the ranking.
        votes: Give the metrics of votes: the completions have answers.
    """
    values, answers = [verdict.value for verdict in verdicts], [verdict.answer for verdict in verdicts]
    number = len(values)
    metrics = {name: math.fsum(values) / number}
    if number == 1:
        return metrics
    right = np.array([sum(value >= 1 for value in values)], dtype=np.int64)
    for k in powers_of_two(number):
        metrics[f"{name}_pass@{k}"] = float(pass_at(right, number, k)[0])
        if votes:
            metrics[f"{name}_maj@{k}"] = majority_at(answers, values, k)
        if ranks is not None:
            metrics[f"{name}_best@{k}"] = best_of(values, ranks, k)
    if votes and ranks is not None:
        metrics[f"{name}_weighted@{number}"] = weighted_vote(answers, values, vote_weights(ranks))
    return metrics


def _first(gold: Any) -> str:
    return str(gold[0] if isinstance(gold, list | tuple) else gold)
