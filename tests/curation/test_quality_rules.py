"""Rules of Gopher, C4 and FineWeb: values computed by hand, naive implementations, and datatrove's own filters."""

import os
import random
import re
from collections import Counter

import pytest
import regex
from datatrove.data import Document as TheirDocument
from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter
from datatrove.pipeline.filters import gopher_repetition_filter as repetition_filter

from lightning_lm.curation import (
    C4Lines,
    C4Quality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Removed,
    as_document,
    c4_lines,
    fineweb_quality,
    gopher_quality,
    gopher_repetition,
)
from lightning_lm.curation.terminal_punctuation import num_sentences, terminal_punctuation
from lightning_lm.curation.words import hash_of_word, words_of
from lightning_lm.errors import ConfigurationError

WORDS = ("the of and that with to data model bread 12 3.5 -- # ... paper, light. über 東京 x" + " common" * 9).split()


def random_text(seed: int) -> str:
    """Return lines of words, some of them bullets, ellipses, copies of earlier lines or without punctuation."""
    draw = random.Random(seed)
    vocabulary = draw.sample(WORDS, draw.randint(4, 18)) + [f"word{number}" for number in range(draw.choice([3, 300]))]
    lines: list[str] = []
    for _ in range(draw.randint(1, 30)):
        if lines and draw.random() < 0.2:
            lines.append(draw.choice(lines))
            continue
        line = " ".join(draw.choices(vocabulary, k=draw.randint(1, 18)))
        begin, end = draw.choice(["", "", "", "- ", "• "]), draw.choice([".", ".", "", "...", "?", '."', " {", "!"])
        lines.append(begin + line + end)
    return draw.choice(["\n", "\n", "\n\n"]).join(lines)


TEXTS = [random_text(seed) for seed in range(int(os.environ.get("NUM_TEXTS", "400")))]
"""`NUM_TEXTS=2000` is the long form; it takes half a minute."""


@pytest.mark.parametrize("text", ["", " \n\t ", "a", "naïve café\u2003x", "\ud800 lone", "a\x00b c", "x" * 600_000])
def test_words_are_those_between_white_space(text):
    words = words_of(text)
    if len(text) < 1000:
        assert words.lengths.tolist() == list(map(len, text.split()))
        assert words.num_letters.tolist() == [sum(map(str.isalpha, word)) for word in text.split()]
        assert words.hashes.tolist() == [hash_of_word(word) for word in text.split()]
    assert words.lengths.sum() == sum(map(len, text.split()))


def test_words_of_a_long_text_do_not_depend_on_its_blocks():
    text = " ".join(f"w{number % 70_000}" for number in range(100_000))  # longer than two blocks
    words, expected = words_of(text), text.split()
    assert words.lengths.tolist() == list(map(len, expected))
    assert len(set(words.hashes.tolist())) == 70_000
    assert (words.hashes[:30_000] == words.hashes[70_000:]).all()


def test_quantities_of_gopher_quality_by_hand():
    text = "- the cat #1 ...\n\n  • of 22 3! and…\nThe end"
    measures = gopher_quality(text)
    assert measures == {
        "num_words": 12,  # - the cat #1 ... | bullet of 22 3! and | The end
        "mean_word_length": pytest.approx((1 + 3 + 3 + 2 + 3 + 1 + 2 + 2 + 2 + 4 + 3 + 3) / 12),
        "hashes_per_word": pytest.approx(1 / 12),
        "ellipses_per_word": pytest.approx(2 / 12),
        "bullet_lines": pytest.approx(2 / 3),
        "ellipsis_lines": pytest.approx(2 / 3),
        "alphabetic_words": pytest.approx(6 / 12),
        "stop_words": 2,  # "the" and "of"; "and…" and "The" are other words
    }


def test_quantities_of_gopher_repetition_by_hand():
    text = "a b c d e f g\n\na b c d e f g\n\nx"
    measures = gopher_repetition(text)
    assert measures["duplicate_lines"] == pytest.approx(1 / 3)
    assert measures["duplicate_paragraph_characters"] == pytest.approx(13 / 27)
    assert measures["top_2_gram"] == pytest.approx(2 * 3 / len(text))  # "a b"
    assert measures["top_4_gram"] == pytest.approx(2 * 7 / len(text))
    assert measures["duplicate_5_grams"] == pytest.approx(7 / 15)  # a word in three 5-grams counts once
    assert measures["duplicate_7_grams"] == pytest.approx(7 / 15)
    assert measures["duplicate_8_grams"] == 0


def naive_repetition(text: str) -> dict[str, float]:
    words, found = text.split(), {}
    for n in (2, 3, 4):
        ngrams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        top = Counter(ngrams).most_common(1)
        found[f"top_{n}_gram"] = len(top[0][0]) * top[0][1] / len(text) if top and top[0][1] > 1 else 0.0
    for n in range(5, 11):
        seen, covered = set(), set()
        for i in range(len(words) - n + 1):
            ngram = tuple(words[i : i + n])
            if ngram in seen:
                covered.update(range(i, i + n))
            seen.add(ngram)
        found[f"duplicate_{n}_grams"] = sum(len(words[i]) for i in covered) / max(sum(map(len, words)), 1)
    return found


def test_repetition_equals_a_naive_implementation():
    for text in [*TEXTS, "", "one", "a a a a a a a a a a a a"]:
        measures = gopher_repetition(text)
        for name, value in naive_repetition(text).items():
            assert measures[name] == pytest.approx(value), (name, text)


def test_lines_of_c4_by_hand():
    text = (
        "A line with a full stop.\nNo stop at the end\nToo short.\nWait for it...\n"
        'Please enable JavaScript to go on.\nWe use cookies on this site.\nShe said: "yes."\n'
        "A fact.[3] It is known.[12]"
    )
    kept = 'A line with a full stop.\nShe said: "yes."\nA fact. It is known.'
    assert c4_lines(text) == kept
    assert num_sentences(kept) == 4
    assert c4_lines(text, C4Lines(end_marks=(), min_words=0, javascript=False, policies=False, citations=False)) == text
    assert c4_lines("w" * 1001 + " is a word.") == ""
    assert c4_lines("w" * 1000 + " is a word.") != ""


def test_sentences_are_those_of_a_pattern():
    draw, alone = random.Random(0), "。！？"
    ends = re.escape("".join(set(regex.findall(r"\p{STerm}", "".join(map(chr, range(0x110000))))) - set(alone)))
    pattern = re.compile(rf"[{ends}…][\"'”’»)\]]*(?=\s|\Z)|[{alone}]")
    for _ in range(2000):
        alphabet = draw.choice((".?!\"')] \n\x1cab", ".?!\"')] …。！”’»é\u3000\U0001f600\ud800؟"))
        text = "".join(draw.choices(alphabet, k=draw.randrange(14)))
        assert num_sentences(text) == len(pattern.findall(text)), text


def test_c4_returns_the_kept_lines_or_the_rule():
    document = as_document("One is here. Two is here! Is three here?\nMenu\nFour is here. Five is here.")
    kept = C4Quality()(document)
    assert kept.text == "One is here. Two is here! Is three here?\nFour is here. Five is here."
    assert kept.id == document.id
    removed = C4Quality(min_sentences=6)(document)
    assert (removed.rule, removed.value, removed.limit) == ("num_sentences", 5, 6)
    assert removed.document is document
    assert C4Quality()(as_document(document.text + "\nif (x) {")).rule == "curly_brackets"
    assert C4Quality(curly_brackets=True)(as_document(document.text + "\nif (x) {")).text == kept.text
    assert C4Quality()(as_document("Lorem Ipsum. " + document.text)).rule == "lorem_ipsum"


def test_quantities_of_fineweb_by_hand():
    text = "Home\n\nA sentence that is longer than thirty characters.\nHome\nया हिन्दी है।"
    assert fineweb_quality(text, line_breaks=True) == {
        "terminal_punctuation": 0.5,
        "duplicate_line_characters": pytest.approx(4 / len(text.replace("\n", ""))),
        "short_lines": 0.75,
        "line_breaks_per_word": pytest.approx(4 / 13),
    }


@pytest.mark.parametrize(
    ("step", "text", "rule"),
    [
        (GopherQuality(), "too short", "num_words"),
        (GopherQuality(min_words=None), "to be " + "ab " * 60, "mean_word_length"),
        (GopherQuality(), "the and of " + "word " * 60 + "# " * 10, "hashes_per_word"),
        (GopherQuality(), "the and of " + "word " * 60 + "12345 " * 60, "alphabetic_words"),
        (GopherQuality(), "word " * 60, "stop_words"),
        (GopherQuality(max_words=100), "the and " + "word " * 100, "num_words"),
        (GopherRepetition(), "same line here\n" * 10, "duplicate_lines"),
        (GopherRepetition(), "buy now " * 30, "top_2_gram"),
        (FineWebQuality(), "no end of a sentence\n" * 9, "terminal_punctuation"),
        (FineWebQuality(), "Short.\nShorter.\nAs short.", "short_lines"),
        (FineWebQuality(max_line_breaks_per_word=0.3, max_short_lines=None), "A.\nB.\nC.", "line_breaks_per_word"),
    ],
)
def test_a_removal_has_rule_value_and_limit(step, text, rule):
    removed = step(as_document(text))
    assert isinstance(removed, Removed)
    assert removed.rule == rule
    bounds = step.bounds()[rule]
    assert removed.limit in bounds
    assert removed.value == step.measures(removed.document)[rule]


def test_empty_documents_are_measured_and_none_turns_rules_off():
    for step in (GopherQuality(), GopherRepetition(), C4Quality(), FineWebQuality()):
        assert all(value == 0 for value in step.measures(as_document("")).values())
    off = {field: None for field in vars(GopherQuality()) if field.startswith(("min_", "max_"))}
    assert GopherQuality(**off)(as_document("")).text == ""


def test_limits_out_of_range_are_refused():
    with pytest.raises(ConfigurationError, match=r"max_bullet_lines=1\.5 must be from 0 to 1"):
        GopherQuality(max_bullet_lines=1.5)
    with pytest.raises(ConfigurationError, match="min_words=-1"):
        C4Lines(min_words=-1)


# --- datatrove's filters on the same documents, with words between white space, as ours are ---


@pytest.fixture
def theirs(monkeypatch):
    for module in (gopher_quality_filter, repetition_filter, fineweb_quality_filter):
        monkeypatch.setattr(module, "split_into_words", lambda text, language: text.split())
    monkeypatch.setattr(c4_filters, "split_into_sentences", lambda text, language: ["."] * num_sentences(text))

    def verdict(step, text):
        result = step.filter(TheirDocument(text=text, id="0"))
        return result is True or result[1]

    return verdict


def test_gopher_quality_is_datatroves(theirs):
    """Differences: they leave punctuation out of the words that they count, and blank lines are lines to them."""
    names = {
        "gopher_short_doc": "num_words",
        "gopher_below_avg_threshold": "mean_word_length",
        "gopher_too_many_hashes": "hashes_per_word",
        "gopher_too_many_ellipsis": "ellipses_per_word",
        "gopher_too_many_bullets": "bullet_lines",
        "gopher_too_many_end_ellipsis": "ellipsis_lines",
        "gopher_below_alpha_threshold": "alphabetic_words",
        "gopher_enough_stop_words": "stop_words",
    }
    found = Counter()
    for text in TEXTS:
        text = "\n".join(line for line in text.splitlines() if line and not {"--", "#", "..."} & set(line.split()))
        text += " # #" * (len(text) % 5) + "\n-"
        verdict = theirs(gopher_quality_filter.GopherQualityFilter(), text)
        symbols = sum(set(word) <= gopher_quality_filter.PUNCTUATION_SET for word in text.split())
        step = GopherQuality(min_words=50 + symbols, min_mean_word_length=None, bullets=("-", "•"))
        ours = step(as_document(text))
        if verdict == "gopher_below_avg_threshold":
            continue
        assert (True if not isinstance(ours, Removed) else ours.rule) == names.get(verdict, verdict), text
        found[verdict] += 1
    assert len(found) >= 5


def test_gopher_repetition_is_datatroves(theirs):
    """Differences: they count the gaps between duplicates by steps of n, divide by all characters, spaces included, and
    call an n-gram that occurs once a repetition; so each of ours is at least as large for duplicates.
    """
    for text in TEXTS:
        measures, words = gopher_repetition(text), text.split()
        for n in range(5, 11):
            their_count = repetition_filter.find_all_duplicate(words, n)
            assert measures[f"duplicate_{n}_grams"] >= their_count / sum(map(len, words)) - 1e-12
        for n in (2, 3, 4):
            top = repetition_filter.find_top_duplicate(repetition_filter.get_n_grams(words, n) or [""]) / len(text)
            assert measures[f"top_{n}_gram"] in (0, pytest.approx(top))
        elements, characters = repetition_filter.find_duplicates(text.replace("\n\n", "\n").split("\n"))
        assert measures["duplicate_lines"] == pytest.approx(elements / (1 + text.replace("\n\n", "\n").count("\n")))
        assert measures["duplicate_line_characters"] == pytest.approx(characters / len(text.replace("\n", "")))


def test_c4_is_datatroves(theirs):
    """Difference: a bracket or "lorem ipsum" in a line that is taken out removes the page here, as in the paper."""
    kept = 0
    for text in TEXTS:
        document = TheirDocument(text=text, id="0")
        verdict = c4_filters.C4QualityFilter().filter(document)
        ours = C4Quality(curly_brackets="{" not in c4_lines(text))(as_document(text))
        if verdict is True:
            assert ours.text == document.text
            kept += 1
        else:
            assert ours.rule in {"too_few_sentences": "num_sentences", "curly_bracket": "curly_brackets"}[verdict[1]]
    assert 40 < kept < len(TEXTS) - 40


def test_fineweb_is_datatroves(theirs):
    """Differences: none, with their limits and lines without spaces at their ends."""
    names = {"line_punct_ratio": "terminal_punctuation", "short_line_ratio": "short_lines"}
    names |= {"char_dup_ratio": "duplicate_line_characters", "list_ratio": "line_breaks_per_word"}
    bounds = {"max_duplicate_line_characters": 0.01, "max_line_breaks_per_word": 0.3}
    for text in TEXTS:
        verdict = theirs(fineweb_quality_filter.FineWebQualityFilter(), text)
        measures = fineweb_quality(text, line_breaks=True)
        order = ("terminal_punctuation", "short_lines", "duplicate_line_characters", "line_breaks_per_word")
        limits = FineWebQuality(**bounds).bounds()
        broken = [
            name
            for name in order
            if measures[name] < (limits[name].minimum or 0) or measures[name] > (limits[name].maximum or 1)
        ]
        assert (broken[0] if broken else True) == names.get(verdict, verdict), text
    differing = terminal_punctuation() ^ set(fineweb_quality_filter.TERMINAL_PUNCTUATION)
    assert len(differing) < 40  # versions of Unicode
    assert not differing & set(".?!。？！।؟")
