import json
import math

import pytest
from evals.tasks.small_data import Oracle, Uniform, score, write_lines, write_table

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals import LogLikelihood
from lightning_lm.evals.tasks import (
    AnswerCheck,
    ChoiceTask,
    ContinuationTask,
    FirstShots,
    GenerationTask,
    PerplexityTask,
    RandomShots,
    SameText,
    by_name,
    names,
    score_choices,
)
from lightning_lm.parts import Part

RECORDS = [
    {"question": f"Q{n}", "choices": ["a", "bb", "ccc"], "answer": n % 3, "topic": "xy"[n % 2]} for n in range(6)
]


def test_a_model_without_an_opinion_scores_chance_wherever_the_right_choices_stand(tmp_path):
    records = [{**record, "answer": 0} for record in RECORDS]
    task = ChoiceTask(name="mine", data=str(write_lines(tmp_path / "test.jsonl", records)))
    assert score(task, Uniform())["acc"] == pytest.approx(1 / 3)
    assert task.chance == pytest.approx(1 / 3)


def test_choices_are_normalised_by_characters_and_by_bytes():
    logprobs, choices = [-3.0, -4.0, -5.5], ["ab", "äöü", "abcde"]
    metrics = score_choices(logprobs, choices, [1])
    assert metrics["acc"] == 0
    characters = [logprob / n for logprob, n in zip(logprobs, (2, 3, 5), strict=True)]
    assert characters.index(max(characters)) == 2
    assert metrics["acc_norm"] == 0
    num_bytes = [logprob / n for logprob, n in zip(logprobs, (2, 6, 5), strict=True)]
    assert num_bytes.index(max(num_bytes)) == 1
    assert metrics["acc_bytes"] == 1
    assert metrics["gold_logprob"] == -4
    assert metrics["gold_bits_per_byte"] == pytest.approx(4 / math.log(2) / 6)


@pytest.mark.parametrize(
    ("logprobs", "gold", "expected"),
    [
        ([-1.0, -1.0, -2.0], [0], 0.5),
        ([-1.0, -1.0, -1.0], [0, 2], 2 / 3),
        ([-100.0, -100.0 - 1e-5, -200.0], [1], 0.5),  # the rounding of float32 sums
        ([-100.0, -100.1, -200.0], [1], 0.0),
        ([-math.inf, -math.inf, -1.0], [2], 1.0),
        ([0.0, 0.0], [1], 0.5),
    ],
)
def test_ties_share_the_point(logprobs, gold, expected):
    assert score_choices(logprobs, ["a"] * len(logprobs), gold)["acc"] == pytest.approx(expected)


@pytest.mark.parametrize("write", ["lines", "table", "saved", "splits"])
def test_items_come_from_any_form_of_file(tmp_path, write):
    if write == "lines":
        data = write_lines(tmp_path / "anything.jsonl", RECORDS)
    elif write == "table":
        data = write_table(tmp_path / "data" / "test-00000-of-00001.parquet", RECORDS).parent
    else:
        datasets = pytest.importorskip("datasets")
        data, saved = tmp_path / "saved", datasets.Dataset.from_list(RECORDS)
        (saved if write == "saved" else datasets.DatasetDict({"test": saved, "train": saved})).save_to_disk(data)
    task = ChoiceTask(name="mine", data=str(data), subject="topic", cluster="topic")
    items = task.items()
    assert [item.gold for item in items] == [0, 1, 2, 0, 1, 2]
    assert [request.continuation for request in items[0].requests] == [" a", " bb", " ccc"]
    assert [item.subject for item in items] == list("xyxyxy")
    assert len({item.id for item in items}) == 6
    assert len({item.cluster for item in items}) == 2


def test_names_of_items_stay_when_others_come_and_copies_differ(tmp_path):
    few = ChoiceTask(name="mine", data=str(write_lines(tmp_path / "few.jsonl", RECORDS[2:4])))
    many = ChoiceTask(name="mine", data=str(write_lines(tmp_path / "many.jsonl", [*RECORDS, RECORDS[2]])))
    first = [item.id for item in few.items()]
    assert first == [item.id for item in many.items()[2:4]]
    assert many.items()[6].id == f"{first[0]}-2"


def test_examples_are_first_ones_or_drawn_by_a_seed_and_never_the_question(tmp_path):
    write_lines(tmp_path / "test.jsonl", RECORDS)
    write_lines(tmp_path / "train.jsonl", [{**record, "question": f"T{n}"} for n, record in enumerate(RECORDS)])
    first = ChoiceTask(name="mine", data=str(tmp_path), shots=FirstShots(num=2)).items()[0].requests[0].prompt
    assert first.text == "T0 a\n\nT1 bb\n\nQ0"
    drawn = [ChoiceTask(name="mine", data=str(tmp_path), shots=RandomShots(num=3, seed=seed)) for seed in (1, 1, 2)]
    texts = [[item.requests[0].prompt.shots for item in task.items()] for task in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 1  # one prefix for all items
    same = ChoiceTask(name="mine", data=str(tmp_path), shots=RandomShots(num=5, split="test"))
    for item in same.items():
        prompt = item.requests[0].prompt
        assert prompt.question not in [shot.question for shot in prompt.shots]
    within = ChoiceTask(name="mine", data=str(tmp_path), subject="topic", shots=FirstShots(num=2, same_subject=True))
    assert [shot.question for shot in within.items()[1].requests[0].prompt.shots] == ["T1", "T3"]


def test_a_question_can_be_chatted(tmp_path):
    task = ChoiceTask(
        name="mine",
        data=str(write_lines(tmp_path / "test.jsonl", RECORDS)),
        question="Q: {{ question }}\n",
        instructions="About {{ topic }}.\n\n",
        shots=FirstShots(num=1, split="test"),
    )
    prompt = task.items()[1].requests[0].prompt
    assert prompt.text == "About y.\n\nQ: Q0\n a\n\nQ: Q1\n"
    assert [message["role"] for message in prompt.messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        (
            {"question": "x", "choices": ["a", "b"]},
            {},
            r"test.jsonl, line 2 .*no field 'answer', which 'gold'.*'question', 'choices'",
        ),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, {}, "0 to 1, got 2"),
        ({"question": "x", "choices": ["a", "b"], "answer": "B"}, {}, "0 to 1, got 'B'"),
        ({"question": "x", "choices": "ab", "answer": 1}, {}, "list of at least two"),
        ({"question": "x", "choices": ["a", ""], "answer": 0}, {}, "choice 1 is empty"),
        ({"choices": ["a", "b"], "answer": 0}, {}, "line 2 .*no field 'question'"),
        (RECORDS[0], {"question": "{{ question.stem }}"}, "line 1 .*'question' of the task cannot be written.*stem"),
        (RECORDS[1], {"shots": FirstShots(num=3, split="test")}, "has 1 besides the question itself.*shots=1"),
        (RECORDS[0], {"shots": FirstShots(num=3)}, r"no split 'train'|single split.*shots=0"),
    ],
)
def test_errors_name_file_place_and_field(tmp_path, record, settings, message):
    path = write_lines(tmp_path / "test.jsonl", [RECORDS[0], record])
    with pytest.raises(DataError, match=message):
        ChoiceTask(name="mine", data=str(path), **settings).items()


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_lines(tmp_path / "mine_train.jsonl", RECORDS)
    write_lines(tmp_path / "mine_dev.jsonl", RECORDS)
    with pytest.raises(DataError, match="no split 'test'; its files are of dev, train"):
        ChoiceTask(name="mine", data=str(tmp_path)).items()
    assert len(ChoiceTask(name="mine", data=str(tmp_path), split="validation").items()) == 6


@pytest.mark.parametrize("template", ["{{ question", "{% for %}"])
def test_a_faulty_template_is_refused(tmp_path, template):
    path = write_lines(tmp_path / "test.jsonl", RECORDS)
    with pytest.raises(ConfigurationError, match="no Jinja template"):
        ChoiceTask(name="mine", data=str(path), question=template).items()


def test_templates_run_in_the_sandbox(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", RECORDS)
    for template in ("{{ question.__class__.__mro__ }}", "{{ 'x' * 3000000000 }}"):
        with pytest.raises(DataError, match="cannot be written"):
            ChoiceTask(name="mine", data=str(path), question=template).items()


def test_line_breaks_at_the_end_of_a_template_stay(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", RECORDS)
    task = ChoiceTask(name="mine", data=str(path), question="{% if true %}\n{{ question }}\n{% endif %}\n")
    assert task.items()[0].requests[0].prompt.text == "\nQ0\n\n"


def test_perplexity_is_a_ratio_of_sums(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", [{"text": "one two three"}, {"text": "vier fünf"}])
    task = PerplexityTask(name="mine", data=str(path))
    scores = [task.score(item, [LogLikelihood(-nats, 5)]) for item, nats in zip(task.items(), (10.0, 2.0), strict=True)]
    metrics = task.aggregate(scores)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(12 / 5))
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(12 / 23))
    assert metrics["bits_per_byte"] == pytest.approx(12 / 23 / math.log(2))


def test_a_continuation_is_right_if_greedy_decoding_gives_it(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", [{"question": "one two", "target": "three"}] * 2)
    task = ContinuationTask(name="mine", data=str(path))
    answers = [LogLikelihood(-1.0, 1, is_greedy=True), LogLikelihood(-3.0, 1)]
    metrics = task.aggregate([task.score(item, [answer]) for item, answer in zip(task.items(), answers, strict=True)])
    assert metrics == {"acc": 0.5, "logprob": -2.0, "perplexity": pytest.approx(math.exp(2))}


def test_completions_are_checked_by_answer(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", [{"question": f"{n}", "answer": [str(n), "any"]} for n in range(4)])
    check = AnswerCheck(same=SameText(ignore_case=True, ignore_punctuation=True))
    task = GenerationTask(name="mine", data=str(path), checks={"em": check})
    assert task.main_metric == "em"
    metrics = score(task, Oracle(lambda prompt: {"0": " 0. ", "1": "ANY", "2": "3"}.get(prompt, "")))
    assert metrics == {"em": 0.5, "tokens": pytest.approx(2.0)}


def test_several_completions_of_a_question(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", [{"question": "?", "answer": "8"}])
    task = GenerationTask(name="mine", data=str(path), num_samples=5, vote="majority")
    assert task.items()[0].requests[0].sampling.temperature == 0.7
    metrics = score(task, Oracle(lambda _: ["8", "8", "9", "8", "7"]))
    assert task.main_metric == "exact_match_maj@5"
    assert metrics["exact_match"] == pytest.approx(0.6)
    assert metrics["exact_match_maj@5"] == 1
    assert metrics["exact_match_pass@2"] == pytest.approx(1 - 1 / 10)
    # Of the pairs, 3 are {8, 8}: won; 6 are {8, other}: half; {9, 7}: lost.
    assert metrics["exact_match_maj@2"] == pytest.approx((3 + 6 / 2) / 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vote": "majority"}, "num_samples=8"),
        ({"vote": "best", "num_samples": 4}, "needs a ranking"),
        ({"checks": {}}, "no checks"),
        ({"num_samples": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        GenerationTask(name="mine", **settings)


def test_tasks_are_plain_data(tmp_path):
    for name in names():
        task = by_name(name, data=str(tmp_path), shots=2)
        assert Part.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_unknown_names_are_met_with_the_nearest(tmp_path):
    with pytest.raises(ConfigurationError, match="Did you mean 'hellaswag'"):
        by_name("helaswag")
    with pytest.raises(ConfigurationError, match="has no num_sample; it has"):
        by_name("gsm8k", num_sample=3)
    with pytest.raises(DataError, match="hf download --repo-type dataset openai/gsm8k"):
        by_name("gsm8k").items()
    with pytest.raises(DataError, match="no file or folder"):
        by_name("gsm8k", data=str(tmp_path / "none")).items()


def test_yaml_describes_a_task(tmp_path):
    write_lines(tmp_path / "quiz" / "test.jsonl", RECORDS)
    path = tmp_path / "quiz.yaml"
    path.write_text(
        "class_path: lightning_lm.evals.tasks.ChoiceTask\n"
        "init_args:\n"
        "  name: quiz\n"
        "  data: quiz\n"
        "  question: 'Question: {{ question }}'\n"
        "  shots:\n"
        "    class_path: FirstShots\n"
        "    init_args: {num: 1, split: test}\n"
    )
    task = by_name(str(path))
    assert task.items()[1].requests[0].prompt.text == "Question: Q0 a\n\nQuestion: Q1"
    assert by_name(str(path), shots=0).items()[1].requests[0].prompt.text == "Question: Q1"
    for text in ("name: quiz", "class_path: ChoiceTask", "- 1", "class_path: ChoicesTask\ninit_args: {name: x}"):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match="describes no task"):
            by_name(str(path))
