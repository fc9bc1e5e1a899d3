import json

import pytest

from lightning_lm.data import tokenize
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals import Item, Likelihood, Prompt
from lightning_lm.evals.contamination import find_contamination, search_tasks, store_documents
from lightning_lm.evals.tasks import ChoiceTask
from lightning_lm.tokenizers import ByteTokenizer

WORDS = [f"word{number}" for number in range(60)]


def item(name, words):
    return Item(name, (Likelihood(Prompt(" ".join(words)), " x"),), gold=0)


@pytest.mark.parametrize(
    ("ngram", "shared", "expected"), [(13, 13, 1 / 8), (13, 12, None), (8, 12, 5 / 13), (8, 8, 1 / 13)]
)
def test_overlap_is_the_fraction_of_an_items_ngrams(ngram, shared, expected):
    items = [item("hit", WORDS[:20]), item("clean", WORDS[20:40]), item("short", WORDS[:3])]
    documents = ["nothing of it", "He wrote: " + " ".join(WORDS[:shared]).upper() + ", and so on."]
    report = find_contamination(items, iter(documents), ngram=ngram)
    assert report.overlaps == ({} if expected is None else {"hit": pytest.approx(expected)})
    assert (report.num_items, report.num_skipped, report.num_documents) == (3, 1, 2)


def test_every_item_of_a_document_is_found_and_the_largest_overlap_counts():
    items = [item("a", WORDS[:20]), item("b", WORDS[30:50])]
    documents = [" ".join(WORDS[:15]), " ".join(WORDS)]
    assert find_contamination(items, documents).overlaps == {"a": 1.0, "b": 1.0}


def test_the_score_is_also_given_on_the_clean_part():
    report = find_contamination([item("a", WORDS[:20]), item("b", WORDS[30:50])], [" ".join(WORDS[:20])])
    scores = report.scores(ChoiceTask(name="mine"), {"a": {"acc": 1.0}, "b": {"acc": 0.0}})
    assert scores == {"all": {"acc": 0.5}, "clean": {"acc": 0.0}, "contaminated": {"acc": 1.0}, "unsearched": {}}


def test_an_item_too_short_to_be_looked_for_is_not_counted_as_clean():
    report = find_contamination([item("a", WORDS[:20]), item("short", WORDS[30:33])], [])
    scores = report.scores(ChoiceTask(name="mine"), {"a": {"acc": 1.0}, "short": {"acc": 0.0}})
    assert (scores["clean"], scores["unsearched"]) == ({"acc": 1.0}, {"acc": 0.0})


def test_the_words_of_the_template_are_not_those_of_an_item(tmp_path):
    words = "The following question has exactly two possible answers, of which only one is right, so choose well: "
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": " ".join(WORDS[:20]), "choices": ["yes sir", "no"], "answer": 0})
        + "\n"
        + json.dumps({"question": "Why?", "choices": ["a", "b"], "answer": 0})
    )
    task = ChoiceTask(name="mine", data=str(tmp_path), question=words + "{{ question }}\nAnswer:")
    assert task.items()[0].text == " ".join(WORDS[:20]) + " yes sir"
    report = find_contamination(task.items(), [words, words + "Why?", " ".join(WORDS[:14])])
    assert list(report.overlaps) == [task.items()[0].id]
    assert report.skipped == {task.items()[1].id}


def test_documents_of_a_token_store_are_decoded_one_at_a_time(tmp_path):
    texts = ["nothing", "He wrote: " + " ".join(WORDS[:15]), ""]
    read = []

    class Watched(ByteTokenizer):
        def decode(self, ids, **settings):
            read.append(len(ids))
            return super().decode(ids, **settings)

    store = tokenize(texts, Watched(), tmp_path / "store", num_workers=0, show_progress=False)
    documents = store_documents(store, Watched())
    assert read == []
    assert find_contamination([item("a", WORDS[:20])], documents).overlaps == {"a": pytest.approx(3 / 8)}
    assert max(read) == len(texts[1])
    store.meta["tokenizer"] = "another"
    with pytest.raises(ConfigurationError, match="another tokenizer"):
        next(store_documents(store, ByteTokenizer()))


def test_several_tasks_are_looked_for_in_one_reading():
    documents = iter([" ".join(WORDS[:20]), " ".join(WORDS[30:50])])
    reports = search_tasks({"one": [item("x", WORDS[:20])], "two": [item("x", WORDS[30:50]), item("y", [])]}, documents)
    assert {name: (dict(report.overlaps), report.num_skipped) for name, report in reports.items()} == {
        "one": ({"x": 1.0}, 0),
        "two": ({"x": 1.0}, 1),
    }


def test_items_of_too_few_words_are_refused():
    with pytest.raises(ConfigurationError, match="None of the 1 items has 8 words"):
        find_contamination([item("a", WORDS[:3])], [])
