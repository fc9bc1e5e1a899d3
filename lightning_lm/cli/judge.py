"""The verb ``lightning-lm evaluate judge``: models compared, graded and ranked by another language model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.cli.generate import add_model_arguments
from lightning_lm.cli.numbers import COUNT, POSITIVE, WHOLE, Number
from lightning_lm.errors import ConfigurationError, UsageError
from lightning_lm.parts import Limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_lm.evals.judges import AnswerSet, ChatModel, Judge, Prices
    from lightning_lm.evals.judges.report import JudgeResult

__all__ = ["add_arguments", "run"]

_NON_NEGATIVE = Number(Limit.NON_NEGATIVE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    verbs = parser.add_subparsers(dest="judge_verb", required=True, metavar="{answer,pairwise,grade,rank,agreement}")
    answer = verbs.add_parser("answer", help="write a model's answers to questions, for a judge")
    answer.add_argument("questions_file", type=Path, metavar="QUESTIONS", help="instructions, or MT-Bench's questions")
    answer.add_argument("--name", metavar="NAME", help="name of the model in results (default: of the output)")
    _add_shared(answer, "the model")
    pairwise = verbs.add_parser("pairwise", help="win rate of a model against a baseline, with length control")
    pairwise.add_argument("answers", type=Path, nargs=2, metavar="ANSWERS", help="of the model, and of the baseline")
    grade = verbs.add_parser("grade", help="grades from 1 to 10 of every answer, of each turn")
    grade.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS", help="of a model")
    rank = verbs.add_parser("rank", help="Bradley-Terry ratings of several models, from all pairs")
    rank.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS", help="of a model")
    rank.add_argument("--anchor", metavar="NAME", help="model whose rating is 1000 (default: the first)")
    agreement = verbs.add_parser("agreement", help="how often a judge agrees with people's labels of pairs")
    agreement.add_argument("labels", type=Path, metavar="LABELS", help="pairs of answers with preference or winner")
    for verb in (pairwise, grade, rank, agreement):
        _add_shared(verb, "the judge")
        verb.add_argument(
            "--by-likelihood", action="store_true", help="the likeliest verdict of --checkpoint, without reasons"
        )
        verb.add_argument("--template", type=Path, metavar="FILE", help="Jinja template of its prompt")
        verb.add_argument(
            "--retries", type=WHOLE, default=1, metavar="N", help="reminders after a malformed verdict (%(default)s)"
        )
    for verb in (pairwise, grade, rank):
        verb.add_argument(
            "--questions", type=Path, metavar="FILE", help="questions of answers that have only their ids"
        )


def _add_shared(parser: argparse.ArgumentParser, title: str) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file of the result")
    parser.add_argument(
        "--replies", type=Path, metavar="FILE", help="replies, which are asked for once (default: beside the output)"
    )
    parser.add_argument("--limit", type=COUNT, metavar="N", help="most questions, evenly spread")
    model = parser.add_argument_group(title)
    model.add_argument("--server", metavar="URL", help="a server with OpenAI's chat interface")
    model.add_argument("--model-name", default="default", metavar="NAME", help="name of the model on the server")
    model.add_argument("--api-key-variable", metavar="NAME", help="environment variable with the server's key")
    model.add_argument("--max-requests", type=COUNT, default=16, metavar="N", help="at the same time (%(default)s)")
    model.add_argument("--body", metavar="JSON", help="further fields of each request; null leaves a field out")
    add_model_arguments(model, required=False)  # type: ignore[arg-type]  # a group takes arguments as a parser does
    model.add_argument("--batch-size", type=COUNT, default=8, metavar="N", help="rows of a pass (%(default)s)")
    model.add_argument("--max-length", type=COUNT, metavar="N", help="tokens of the context (default: the model's)")
    model.add_argument("--max-tokens", type=COUNT, default=1024, metavar="N", help="of a reply (%(default)s)")
    model.add_argument("--temperature", type=_NON_NEGATIVE, default=0.0, metavar="X", help="0 is greedy (%(default)s)")
    model.add_argument("--seed", type=WHOLE, default=0, metavar="N", help="of sampled replies (%(default)s)")
    model.add_argument(
        "--prices", type=POSITIVE, nargs=2, metavar=("IN", "OUT"), help="of a million tokens read, and written"
    )


def run(namespace: argparse.Namespace) -> int:
    """Carry out the verb and return the exit status.

    Args:
        namespace: Parsed arguments of `add_arguments`.

    Raises:
        UsageError: If no model is named, or two.
        LightningLMError: If files cannot be used, or the model breaks off.
    """
    if (namespace.checkpoint is None) == (namespace.server is None):
        raise UsageError(f"lightning-lm evaluate judge {namespace.judge_verb} needs one of --server and --checkpoint.")
    if getattr(namespace, "by_likelihood", False) and namespace.checkpoint is None:
        raise UsageError("--by-likelihood needs the likelihoods of a --checkpoint; servers of chats return none.")
    verbs = {"answer": _answer, "pairwise": _pairwise, "grade": _grade, "rank": _rank, "agreement": _agreement}
    verbs[namespace.judge_verb](namespace)
    return 0


def _answer(namespace: argparse.Namespace) -> None:
    from lightning_lm.evals.judges import answer_questions, load_questions, save_answers
    from lightning_lm.evals.judges.judge import price_text

    questions = load_questions(namespace.questions_file)
    if namespace.limit is not None and namespace.limit < len(questions):
        names = list(questions)
        chosen = [names[index * len(names) // namespace.limit] for index in range(namespace.limit)]
        questions = {name: questions[name] for name in chosen}
    total = sum(len(question.turns) for question in questions.values())
    name = namespace.name or namespace.output.stem
    answers, model = _asked(namespace, total, lambda model: answer_questions(model, name, questions))
    save_answers(answers, namespace.output)
    print(f"{len(questions):,} answers of {name}: {namespace.output}. {price_text(model.usage, _prices(namespace))}")


def _pairwise(namespace: argparse.Namespace) -> None:
    from lightning_lm.evals.judges import compare_answers
    from lightning_lm.evals.judges.exchanges import matched

    model, baseline = _answers(namespace)
    template = _template(namespace)
    total = 2 * len(matched([model, baseline], namespace.limit))
    result, judge = _asked(
        namespace,
        total,
        lambda judge: compare_answers(judge, model, baseline, template=template, limit=namespace.limit),
    )
    _report(result, judge, template, namespace)


def _grade(namespace: argparse.Namespace) -> None:
    from lightning_lm.evals.judges import grade_answers
    from lightning_lm.evals.judges.exchanges import matched

    models, template, limit = _answers(namespace), _template(namespace), namespace.limit
    total = sum(len(one.exchanges[name].answers) for one in models for name in matched([one], limit))
    results, judge = _asked(
        namespace, total, lambda judge: [grade_answers(judge, one, template=template, limit=limit) for one in models]
    )
    _report(results, judge, template, namespace)


def _rank(namespace: argparse.Namespace) -> None:
    from lightning_lm.evals.judges import rank_answers
    from lightning_lm.evals.judges.exchanges import matched

    models, template, limit = _answers(namespace), _template(namespace), namespace.limit
    total = len(models) * (len(models) - 1) * len(matched(models, limit))
    result, judge = _asked(
        namespace,
        total,
        lambda judge: rank_answers(judge, models, anchor=namespace.anchor, template=template, limit=limit),
    )
    _report(result, judge, template, namespace)


def _agreement(namespace: argparse.Namespace) -> None:
    from lightning_lm.evals.judges import compare_with_people, load_labels

    pairs, template = load_labels(namespace.labels), _template(namespace)
    if namespace.limit is not None and namespace.limit < len(pairs):
        pairs = [pairs[index * len(pairs) // namespace.limit] for index in range(namespace.limit)]
    result, judge = _asked(
        namespace, 2 * len(pairs), lambda judge: compare_with_people(judge, pairs, template=template)
    )
    _report(result, judge, template, namespace)


def _answers(namespace: argparse.Namespace) -> "list[AnswerSet]":
    from lightning_lm.evals.judges import load_answers, load_questions

    questions = None if namespace.questions is None else load_questions(namespace.questions)
    return [load_answers(path, questions) for path in namespace.answers]


def _template(namespace: argparse.Namespace) -> str:
    from lightning_lm.evals.judges.prompts import GRADING_TEMPLATE, PAIRWISE_TEMPLATE

    if namespace.template is None:
        return GRADING_TEMPLATE if namespace.judge_verb == "grade" else PAIRWISE_TEMPLATE
    try:
        return str(namespace.template.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"The template {namespace.template} is no UTF-8 text: {error}.") from error


def _asked(namespace: argparse.Namespace, total: int, ask: "Callable[[Judge], Any]") -> "tuple[Any, Judge]":
    """Return what a function makes of the model, and the model with what it cost."""
    from lightning_lm.evals.judges import Judge
    from lightning_lm.evals.response_cache import ResponseCache
    from lightning_lm.evals.runner import progress_bar

    replies = namespace.replies or namespace.output.with_name(f"{namespace.output.name}.replies")
    with progress_bar(total, shown=sys.stderr.isatty()) as advance:
        judge = Judge(
            _model(namespace),
            ResponseCache(replies),
            retries=getattr(namespace, "retries", 0),
            advance=lambda count: advance(namespace.judge_verb, count),
        )
        return ask(judge), judge


def _model(namespace: argparse.Namespace) -> "ChatModel":
    from lightning_lm.evals.judges import LikelihoodChat, LocalChat, ServerChat
    from lightning_lm.generation import Sampling

    if namespace.server is not None:
        from lightning_lm.json_http import JSONServer

        return ServerChat(
            server=JSONServer(namespace.server, api_key_variable=namespace.api_key_variable),
            model=namespace.model_name,
            max_tokens=namespace.max_tokens,
            temperature=namespace.temperature,
            max_requests=namespace.max_requests,
            body=_body(namespace),
        )
    from lightning_lm.cli.evaluate import local_model

    model = local_model(namespace, chat=None)
    if getattr(namespace, "by_likelihood", False):
        said = range(1, 11) if namespace.judge_verb == "grade" else ("A", "B", "tie")
        return LikelihoodChat(model=model, options=tuple(f"Verdict: {verdict}" for verdict in said))
    sampling = Sampling(temperature=namespace.temperature, seed=namespace.seed)
    return LocalChat(model=model, max_tokens=namespace.max_tokens, sampling=sampling)


def _body(namespace: argparse.Namespace) -> dict[str, Any]:
    from lightning_lm.storage.json_text import parse_json

    own = {"seed": namespace.seed} if namespace.temperature else {}
    try:
        given = parse_json(namespace.body or "{}")
    except ValueError as error:
        raise UsageError(f"--body {namespace.body!r} is no JSON: {error}.") from error
    if not isinstance(given, dict):
        raise UsageError(f"--body {namespace.body!r} is no JSON object; write it as '{{\"top_p\": 0.9}}'.")
    return {**own, **given}


def _prices(namespace: argparse.Namespace) -> "Prices | None":
    from lightning_lm.evals.judges import Prices

    return None if namespace.prices is None else Prices(*namespace.prices)


def _report(result: "JudgeResult", judge: "Judge", template: str, namespace: argparse.Namespace) -> None:
    from rich.console import Console

    from lightning_lm.evals.judges.judge import price_text
    from lightning_lm.evals.judges.report import judge_table, save_result

    prices = _prices(namespace)
    Console(width=None if sys.stdout.isatty() else 80).print(judge_table(result))
    print(f"Judge: {price_text(judge.usage, prices)}")
    save_result(result, namespace.output, judge, template, prices)
    print(f"Result: {namespace.output}; replies: {judge.cache.path if judge.cache else '-'}")
