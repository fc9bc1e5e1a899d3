import json
import math

import pytest
from evaluation_stand_ins import ConstantModel, Echo, NextLetter, model
from rich.console import Console

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals import LocalModel, Results, Reverse, compare_results, evaluate_tasks, with_contamination
from lightning_lm.evals import runner as runner_module
from lightning_lm.evals.report import comparison_table, results_table, save_figure
from lightning_lm.evals.statistics import score_of
from lightning_lm.generation import Sampling
from lightning_lm.tokenizers import ByteTokenizer


def test_scores_are_those_of_the_items_with_their_clusters_and_subjects():
    results = evaluate_tasks([NextLetter(count=40), Echo()], ConstantModel())
    task = results["next_letter"]
    right = [item.scores["acc"] for item in task.items]
    assert task.main == score_of(right, [str(index // 3) for index in range(40)])
    assert task.scores["perplexity"].value == pytest.approx(math.exp(sum(i.scores["nats"] for i in task.items) / 40))
    assert task.subjects["odd"]["acc"].value == pytest.approx(sum(right[1::2]) / 20)
    assert (task.main.num_clusters, results["echo"].main.num_items) == (14, 3)


def test_results_are_written_whole_and_read_again(tmp_path):
    path = tmp_path / "deep" / "results.json"
    results = evaluate_tasks([NextLetter()], ConstantModel(), output=path, limit=5, seed=3)
    assert Results.load(path) == results
    assert json.loads(path.read_text())["settings"] == {"seed": 3, "limit": 5}
    assert [item.id for item in results["next_letter"].items] == ["0", "2", "4", "7", "9"]
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    path.write_text("{}")
    with pytest.raises(DataError, match=r"results\.json is no result"):
        Results.load(path)


def test_a_run_that_broke_off_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_AT_ONCE", 4)
    path, tasks = tmp_path / "results.json", [NextLetter(count=12), NextLetter(name="longer", count=16)]
    with pytest.raises(ConnectionError):
        evaluate_tasks(tasks, ConstantModel(fail_after=36), output=path)
    assert not path.exists()
    journal = path.with_name("results.json.journal")
    journal.write_bytes(journal.read_bytes() + b'{"task": "cut o')  # killed while writing
    model = ConstantModel()
    resumed = evaluate_tasks(tasks, model, output=path)
    assert model.asked == 2 * 28 - 32
    assert resumed.tasks == evaluate_tasks(tasks, ConstantModel()).tasks
    assert not journal.exists()


def test_a_journal_of_another_run_is_not_used(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ConnectionError):
        evaluate_tasks([NextLetter(), Echo()], ConstantModel(fail_after=24), output=path)
    model = ConstantModel()
    evaluate_tasks([NextLetter(), Echo()], model, output=path, seed=1)
    assert model.asked == 27


def test_a_comparison_is_of_the_same_items_and_prompts(tmp_path):
    class Better(ConstantModel):
        def log_likelihoods(self, requests):
            return [type(a)(-float(i % 2), 1) for i, a in enumerate(super().log_likelihoods(requests))]

    first, second = (evaluate_tasks([NextLetter(count=40)], model) for model in (Better(), ConstantModel()))
    found = compare_results(first, second)["next_letter"]
    assert list(found) == ["acc"]
    gained = sum(item.scores["acc"] == 0 for item in second["next_letter"].items)
    assert found["acc"].value == pytest.approx(gained / 40)
    assert found["acc"].mcnemar_p_value is None, "items of a cluster are not independent"
    other = evaluate_tasks([NextLetter(count=40, shots=1)], ConstantModel())
    with pytest.raises(DataError, match="different items or prompts"):
        compare_results(first, other)
    with pytest.raises(DataError, match="No task is in both"):
        compare_results(first, evaluate_tasks([Echo()], ConstantModel()))
    assert printed(comparison_table({"next_letter": found}, first, second))


def printed(table):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    return "\n".join(lines)


def test_tables_fit_into_80_columns_and_say_what_was_cut(tmp_path):
    results = evaluate_tasks([NextLetter(name="a_task_with_a_rather_long_name_for_a_table"), Echo()], ConstantModel())
    text = printed(results_table(results))
    assert "chance" in text
    assert "even" in text
    save_figure(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_sampled_completions_of_an_item_depend_on_the_seed_and_on_the_item_alone(monkeypatch):
    lm = LocalModel(model(), ByteTokenizer(), batch_size=4)
    tasks = [Reverse(num_items=6, num_samples=2, num_digits=3, max_new_tokens=4, sampling=Sampling(temperature=5.0))]
    written, complete = [], LocalModel.generate
    monkeypatch.setattr(LocalModel, "generate", lambda self, asked: kept(written, complete(self, asked)))
    whole = evaluate_tasks(tasks, lm)
    monkeypatch.setattr(runner_module, "_GENERATED_AT_ONCE", 1)
    assert evaluate_tasks(tasks, lm).tasks == whole.tasks
    texts = [text for answer in written[:6] for text in answer.texts]
    assert [answer.texts for answer in written[:6]] == [answer.texts for answer in written[6:]]
    assert len(set(texts)) == 12, "draws do not repeat in the next block"
    evaluate_tasks(tasks, lm, limit=3)
    assert [answer.texts for answer in written[12:]] == [answer.texts for answer in written[0:6:2]]
    evaluate_tasks(tasks, lm, seed=1, limit=1)
    assert written[-1].texts != written[0].texts


def kept(where, answers):
    where.extend(answers)
    return answers


def test_core_is_the_mean_of_centred_accuracies_with_the_error_of_independent_tasks(tmp_path):
    results = evaluate_tasks([NextLetter(count=40), NextLetter(name="other", count=12), Echo()], ConstantModel())
    tasks = [results[name] for name in ("next_letter", "other")]
    assert results.core.value == pytest.approx(sum((task.main.value - 0.5) / 0.5 for task in tasks) / 2)
    assert results.core.standard_error == pytest.approx(math.hypot(*(2 * t.main.standard_error for t in tasks)) / 2)
    results.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["core"]["value"] == pytest.approx(results.core.value)
    assert "CORE" in printed(results_table(results))
    assert evaluate_tasks([NextLetter(), Echo()], ConstantModel()).core is None


def test_scores_stand_beside_those_of_clean_items(tmp_path):
    tasks = [NextLetter(count=6), Echo()]
    results = with_contamination(evaluate_tasks(tasks, ConstantModel()), tasks, ["After c comes"], ngram=3)
    found = results["next_letter"].contamination
    assert (found.overlaps, found.num_documents) == ({"2": 1.0}, 1)
    assert {part: scores["acc"].num_items for part, scores in found.scores.items()} == {"clean": 5, "contaminated": 1}
    assert results["echo"].contamination.skipped == ["0", "1", "2"]
    text = printed(results_table(results))
    assert "of clean items" in text
    assert "1 of 6 items share 3 words" in " ".join(text.split())
    results.save(tmp_path / "a.json")
    assert repr(Results.load(tmp_path / "a.json")) == repr(results), "NaN is not equal to itself"


def test_what_cannot_be_evaluated_is_refused():
    with pytest.raises(ConfigurationError, match="one name"):
        evaluate_tasks([Echo(), Echo(count=4)], ConstantModel())
    with pytest.raises(ConfigurationError, match="limit=0"):
        evaluate_tasks([Echo()], ConstantModel(), limit=0)
    with pytest.raises(ConfigurationError, match="no items"):
        evaluate_tasks([Echo(count=0)], ConstantModel())


def test_a_local_model_is_asked_and_the_first_prompt_is_kept():
    lm = LocalModel(model(context_length=40), ByteTokenizer(), batch_size=5)
    results = evaluate_tasks([NextLetter(), Echo()], lm)
    assert results["next_letter"].first_prompt == "After a comes b\n\nAfter b comes c\n\nAfter a comes b"
    assert results["next_letter"].num_dropped == 12
    assert "left out of 12 of 12" in printed(results_table(results))
