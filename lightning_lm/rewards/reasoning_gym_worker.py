"""The process that runs the verifiers of Reasoning Gym, some of which evaluate the answer as a Python expression.

Given to the sandbox as a program by `reasoning_gym`. The first line on standard input is the import path as JSON; each
further line is a JSON object with ``task``, ``config``, ``entry`` (pickled) and ``answer``, or ``null`` for the answer
to be wrong. Each line of output is the score, or a text that says why there is none.
"""

import base64
import functools
import json
import math
import os
import pickle
import sys
from typing import Any

__all__ = ["main", "score_answer"]


@functools.lru_cache(maxsize=64)
def dataset_of(task: str, config: str) -> Any:
    """Return the dataset of a task.

    Args:
        task: Name of the task.
        config: All its settings, as JSON.
    """
    from reasoning_gym.factory import create_dataset

    return create_dataset(task, **json.loads(config))


def score_answer(dataset: Any, entry: dict[str, Any], answer: str) -> float | str:
    """Return the verifier's score, or a text if the verifier fails on every answer.

    Args:
        dataset: The dataset that the entry is from.
        entry: Question, answer and metadata.
        answer: Answer to score. One on which the verifier raises is wrong: many cannot be read.
    """
    try:
        score = float(dataset.score_answer(answer, entry))
        return score if math.isfinite(score) else 0.0
    except Exception:  # noqa: BLE001 - a verifier is foreign code that may raise anything on a malformed answer
        reason = _failure_on_right_answer(dataset, entry)
        return 0.0 if reason is None else reason


def _failure_on_right_answer(dataset: Any, entry: dict[str, Any]) -> str | None:
    try:
        dataset.score_answer(entry["answer"], entry)
    except Exception as error:  # noqa: BLE001
        return f"the verifier fails on its own answer: {type(error).__name__}: {error}"
    return None


def main() -> None:
    """Answer requests until standard input ends."""
    # Expressions that print must not be taken for scores.
    scores = os.dup(1)
    os.dup2(2, 1)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:] = json.loads(sys.stdin.readline())
    import reasoning_gym  # noqa: F401

    os.write(scores, b"ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        entry = pickle.loads(base64.b64decode(request["entry"]))
        found = score_answer(dataset_of(request["task"], request["config"]), entry, request["answer"])
        os.write(scores, json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    main()
