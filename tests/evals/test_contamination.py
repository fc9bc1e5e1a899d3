import pytest

from lightning_lm.errors import ConfigurationError
from lightning_lm.evals import Item, Likelihood, Prompt
from lightning_lm.evals.contamination import find_contamination
from lightning_lm.evals.tasks import ChoiceTask

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
    assert scores == {"all": {"acc": 0.5}, "clean": {"acc": 0.0}, "contaminated": {"acc": 1.0}}


def test_items_of_too_few_words_are_refused():
    with pytest.raises(ConfigurationError, match="None of the 1 items has 8 words"):
        find_contamination([item("a", WORDS[:3])], [])
