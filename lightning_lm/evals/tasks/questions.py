"""Published tasks that are answered in words or numbers.

TriviaQA (Joshi et al. 2017, arXiv:1705.03551), GSM8K (Cobbe et al. 2021, arXiv:2110.14168) and MATH (Hendrycks et al.
2021, arXiv:2103.03874; the prompt is that of Lewkowycz et al. 2022, arXiv:2206.14858).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning_lm.data.records import Place, Placed
from lightning_lm.errors import DataError
from lightning_lm.evals.tasks.few_shot import FirstShots, RandomShots, Shots
from lightning_lm.evals.tasks.generation_task import GenerationTask
from lightning_lm.evals.tasks.verdicts import AnswerCheck, Check, SameText, SameValue
from lightning_lm.rewards import AnswerPattern, Boxed

__all__ = ["GSM8K", "MATH", "TriviaQA"]

_AFTER_HASHES = r"#### (\-?[0-9\.\,]+)"
_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
_SAME_NUMBER = SameText(ignore_case=True, ignored=(",", r"\$", r"(?s).*#### ", r"\.$"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriviaQA(GenerationTask):
    """Trivia questions without documents; any of an answer's aliases is right."""

    name: str = "triviaqa"
    split: str = "validation"
    subset: tuple[str, ...] = ("rc.nocontext", "unfiltered-web")
    question: str = "Question: {{ question }}?\nAnswer:"
    answer: str = "aliases"
    solution: str = "{{ value }}"
    stop: tuple[str, ...] = ("\n", ".", ",")
    max_new_tokens: int = 32
    checks: Mapping[str, Check] = dataclasses.field(
        default_factory=lambda: {
            "exact_match": AnswerCheck(same=SameText(ignore_case=True, ignore_punctuation=True)),
        }
    )
    shots: Shots = RandomShots()

    hub: ClassVar[str] = "mandarjoshi/trivia_qa"
    folders: ClassVar[tuple[str, ...]] = ("trivia_qa", "triviaqa-unfiltered", "triviaqa-rc")

    def files(self, split: str, *, text: bool = False) -> list[Path]:
        """Return the files of a split, without those of the questions that the authors have verified: others have them.

        Args:
            split: Name of the split.
            text: Take plain text as well as records.
        """
        found = super().files(split, text=text)
        return [path for path in found if not path.name.startswith("verified-")] or found

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the questions; the authors' files have all of them in one object, some for web and Wikipedia both."""
        known = set()
        for place, record in super().records(split):
            if "Data" not in record:
                yield Placed(place, record)
                continue
            for number, entry in enumerate(record["Data"]):
                name = entry.get("QuestionId", (place.file, number))
                if name not in known:
                    known.add(name)
                    yield Placed(Place(place.file, f"entry {number} of 'Data'"), entry)

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with ``question``, ``aliases`` and ``value``, in lower case on the Hub only."""
        answer = record.get("answer", record.get("Answer")) or {}
        aliases = answer.get("aliases", answer.get("Aliases"))
        value = answer.get("value", answer.get("Value"))
        question = record.get("question", record.get("Question"))
        if question is None or value is None:
            raise DataError(f"no question or no value of its answer; the record has {', '.join(map(repr, record))}.")
        return {"question": question, "aliases": aliases or [value], "value": value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K(GenerationTask):
    """Word problems of grade school, with worked solutions that end in ``#### 18``.

    ``strict_match`` wants that form, ``flexible_extract`` takes the last number of any text.
    """

    name: str = "gsm8k"
    subset: tuple[str, ...] = ("main/",)
    question: str = "Question: {{ question }}\nAnswer:"
    stop: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
    checks: Mapping[str, Check] = dataclasses.field(
        default_factory=lambda: {
            "strict_match": AnswerCheck(extract=(AnswerPattern(pattern=_AFTER_HASHES),), same=_SAME_NUMBER),
            "flexible_extract": AnswerCheck(extract=(AnswerPattern(pattern=_NUMBER, last=True),), same=_SAME_NUMBER),
        }
    )
    shots: Shots = FirstShots(num=5)

    hub: ClassVar[str] = "openai/gsm8k"
    answer_cue: ClassVar[str] = "\n####"
    checks_cue: ClassVar[bool] = True

    def files(self, split: str, *, text: bool = False) -> list[Path]:
        """Return the files of a split; the authors' folder has each question a second time, with Socratic solutions.

        Args:
            split: Name of the split.
            text: Take plain text as well as records.
        """
        found = super().files(split, text=text)
        return [path for path in found if "socratic" not in path.name] or found


@dataclasses.dataclass(frozen=True, kw_only=True)
class MATH(GenerationTask):
    r"""Problems of mathematical competitions, compared by value; the right answer is the solution's last ``\boxed``."""

    name: str = "math"
    question: str = "Problem:\n{{ problem }}\n\nSolution:"
    answer: str = "boxed"
    solution: str = "{{ solution }}"
    subject: str = "type"
    stop: tuple[str, ...] = ("Problem:",)
    max_new_tokens: int = 1024
    checks: Mapping[str, Check] = dataclasses.field(
        default_factory=lambda: {
            "exact_match": AnswerCheck(
                extract=(
                    AnswerPattern(pattern=r"(?s)[Ff]inal answer is (.*?)\. I hope it is correct"),
                    Boxed(),
                    AnswerPattern(pattern=r"(?i)answer is:?\s*\$?([^\n$]+?)\$?\.?\s*(?:\n|$)", last=True),
                ),
                same=SameValue(),
            )
        }
    )
    shots: Shots = FirstShots(num=4)

    checks_cue: ClassVar[bool] = True
    hub: ClassVar[str] = "EleutherAI/hendrycks_math"
    folders: ClassVar[tuple[str, ...]] = ("hendrycks_math", "competition_math")

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with the ``boxed`` answer of its solution."""
        boxed = Boxed()(str(record.get("solution", "")))
        if boxed is None:
            raise DataError("the solution has no \\boxed{...} with the right answer; repair the record or remove it.")
        return {"type": "", **record, "boxed": boxed}
