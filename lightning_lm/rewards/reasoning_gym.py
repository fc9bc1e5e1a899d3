"""Rewards by the verifiers of Reasoning Gym, for the questions of `data.ReasoningGym`.

A record has the task, the settings and the index of its question, so that the question is made again wherever it is
scored: a reward needs no state. Some verifiers evaluate the answer as a Python expression, and some take forever on a
hostile one, so they run in the sandbox, in a process that is ended when a score takes too long.
"""

import base64
import functools
import importlib
import importlib.util
import json
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from lightning_lm import gym
from lightning_lm.errors import ConfigurationError, DataError, LightningLMError, MissingDependencyError
from lightning_lm.rewards.answer_workers import START_S, LineProcess
from lightning_lm.rewards.answers import Reward
from lightning_lm.rewards.extractors import AfterHashes, AnswerExtractor, AnswerTags, Boxed
from lightning_lm.rewards.sandbox import Sandbox

__all__ = ["ReasoningGymAnswer"]


@dataclass(frozen=True, kw_only=True)
class ReasoningGymAnswer(Reward):
    """Score of the completion's final answer by the verifier of its task, from 0 to 1; ``None`` without a task.

    Reads the columns of `data.ReasoningGym`: ``task``, ``config``, ``index`` and ``question``.

    Args:
        extractors: Ways to find the final answer; the first that finds one decides, and a completion without an answer
            scores 0. By default: in ``<answer>`` tags, boxed, after ``####``, or else the whole completion.
        partial_credit: Give the scores below 1 of some verifiers, such as for a right answer among other text;
            otherwise they are 0.
        sandbox: Limits of a verifier; an answer that exceeds them scores 0. ``None`` runs the verifiers in this
            process, without limits: only for tasks whose verifiers do not evaluate the answer.

    Raises:
        DataError: If the question that a record describes is not the record's.
    """

    extractors: tuple[AnswerExtractor, ...] | None = None
    partial_credit: bool = True
    sandbox: Sandbox | None = Sandbox(time_s=5.0, memory_mb=4096)

    limits_itself: ClassVar[bool] = True

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Score each final answer; ``None`` where a sample has no task."""
        tasks = columns.get("task") or [None] * len(completions)
        scores: list[float | None] = []
        for number, (completion, task) in enumerate(zip(completions, tasks, strict=True)):
            record = {name: columns[name][number] for name in ("config", "index", "question")} if task else {}
            scores.append(self._score(completion, task, record) if task else None)
        return scores

    def _score(self, completion: str, task: str, record: Mapping[str, Any]) -> float:
        answer = self._answer(completion)
        if answer is None:
            return 0.0
        config = json.dumps(record["config"], sort_keys=True)
        entry = _entry(task, config, record["index"], record["question"])
        if self.sandbox is None:
            score = gym.score_answer(gym.dataset_of(task, config), pickle.loads(entry), answer)
        else:
            score = _VERIFIERS.score(self.sandbox, task, config, entry, answer)
        if isinstance(score, str):
            raise LightningLMError(f"{task}, index {record['index']} of {config}: {score}")
        return score if self.partial_credit else float(score >= 1)

    def _answer(self, completion: str) -> str | None:
        extractors = self.extractors or (AnswerTags(), Boxed(), AfterHashes())
        found = next((found for find in extractors if (found := find(completion)) is not None), None)
        return completion.strip() if found is None and self.extractors is None else found


@functools.lru_cache(maxsize=4096)
def _entry(task: str, config: str, index: int, question: str) -> bytes:
    """Return the pickled entry of a record, made again."""
    try:
        importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise MissingDependencyError("reasoning-gym", "score its answers", "gym") from error
    entry = gym.dataset_of(task, config)[index]
    if entry["question"] != question:
        raise DataError(
            f"Question {index} of {task} with config={config} is {entry['question'][:80]!r} here, and the record has "
            f"{question[:80]!r}: the records were written by another version of Reasoning Gym, or for another "
            "PYTHONHASHSEED. Generate them again with ReasoningGym."
        )
    return pickle.dumps(entry)


class _Verifiers:
    """The sandboxed process, started again after one that was ended. A forked process starts its own."""

    def __init__(self) -> None:
        self._running: tuple[int, Sandbox, LineProcess, Any] | None = None
        self._lock = threading.Lock()

    def score(self, sandbox: Sandbox, task: str, config: str, entry: bytes, answer: str) -> float | str:
        request = {"task": task, "config": config, "entry": base64.b64encode(entry).decode(), "answer": answer}
        with self._lock:
            if self._running is None or self._running[:2] != (os.getpid(), sandbox):
                self._running = (os.getpid(), sandbox, *_start(sandbox))
            line = self._running[2].ask(json.dumps(request).encode(), sandbox.time_s)
            if line is None:
                self._running = None
                return 0.0
        score: float | str = json.loads(line)
        return score


_VERIFIERS = _Verifiers()


def _start(sandbox: Sandbox) -> tuple[LineProcess, Any]:
    folder = tempfile.TemporaryDirectory(prefix="verifier-", ignore_cleanup_errors=True)
    spec = importlib.util.find_spec("reasoning_gym")
    assert spec is not None
    assert spec.origin is not None
    libraries = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    libraries = list(dict.fromkeys([str(Path(spec.origin).parents[1]), *libraries]))
    try:
        served = sandbox.serve(Path(gym.__file__).read_text(), Path(folder.name), readable=libraries)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{error} Or run the verifiers without a sandbox, if they do not evaluate answers as Python (most do not): "
            "ReasoningGymAnswer(sandbox=None), sandbox: null in YAML."
        ) from error
    process = LineProcess(served)
    standard = [entry for entry in sys.path if entry.startswith(sys.base_prefix)]
    if process.ask(json.dumps([*standard, *libraries]).encode(), START_S) != b"ready":
        raise LightningLMError(
            "The sandbox in which the verifiers of Reasoning Gym run did not start, perhaps for lack of memory. Raise "
            "sandbox.memory_mb, or set sandbox to null to run them without one."
        )
    return process, folder
