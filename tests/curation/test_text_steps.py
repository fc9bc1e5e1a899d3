"""Normal form, language, word lists, known texts and contamination."""

import numpy as np
import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from lightning_lm.curation import (
    BloomFilter,
    Decontaminate,
    EvaluationIndex,
    KnownTexts,
    Language,
    NormalizeText,
    Removed,
    WordList,
    as_document,
    count_listed,
    identify_language,
    normalize_text,
)
from lightning_lm.data import Files, Texts
from lightning_lm.errors import ConfigurationError, DataError

LANGUAGES = {
    "en": "The ship left the harbour early in the morning, and nobody on board knew where it was going.",
    "de": "Das Schiff verließ den Hafen früh am Morgen, und niemand an Bord wusste, wohin die Reise ging.",
    "fr": "Le bateau a quitté le port tôt le matin et personne à bord ne savait où il allait.",
    "es": "El barco salió del puerto por la mañana temprano y nadie a bordo sabía adónde iba.",
    "it": "La nave lasciò il porto di buon mattino e nessuno a bordo sapeva dove fosse diretta.",
    "pt": "O navio deixou o porto de manhã cedo e ninguém a bordo sabia para onde ele ia.",
    "nl": "Het schip verliet vroeg in de ochtend de haven en niemand aan boord wist waar het heen ging.",
    "sv": "Fartyget lämnade hamnen tidigt på morgonen och ingen ombord visste vart det var på väg.",
    "pl": "Statek opuścił port wcześnie rano i nikt na pokładzie nie wiedział, dokąd płynie.",
    "cs": "Loď opustila přístav brzy ráno a nikdo na palubě nevěděl, kam pluje.",
    "fi": "Laiva lähti satamasta varhain aamulla, eikä kukaan laivalla tiennyt, minne se oli menossa.",
    "hu": "A hajó kora reggel hagyta el a kikötőt, és senki sem tudta a fedélzeten, hová megy.",
    "tr": "Gemi sabah erkenden limandan ayrıldı ve gemideki hiç kimse nereye gittiğini bilmiyordu.",
    "ro": "Nava a părăsit portul dis-de-dimineață și nimeni de la bord nu știa încotro se îndreaptă.",
    "ru": "Корабль покинул гавань рано утром, и никто на борту не знал, куда он идёт.",
    "uk": "Корабель залишив гавань рано вранці, і ніхто на борту не знав, куди він прямує.",
    "el": "Το πλοίο έφυγε από το λιμάνι νωρίς το πρωί και κανείς δεν ήξερε πού πήγαινε.",
    "he": "הספינה עזבה את הנמל מוקדם בבוקר ואיש על סיפונה לא ידע לאן היא מפליגה.",
    "ar": "غادرت السفينة الميناء في الصباح الباكر ولم يعرف أحد على متنها إلى أين تتجه.",
    "hi": "जहाज़ सुबह जल्दी बंदरगाह से निकल गया और किसी को नहीं पता था कि वह कहाँ जा रहा है।",
    "th": "เรือออกจากท่าแต่เช้าตรู่ และไม่มีใครบนเรือรู้ว่ามันกำลังจะไปที่ไหน",
    "ja": "船は朝早く港を出たが、どこへ向かうのか船に乗っている人は誰も知らなかった。",
    "ko": "배는 아침 일찍 항구를 떠났고 배에 탄 사람 중 아무도 어디로 가는지 몰랐다.",
    "zh": "船一大早就离开了港口，船上没有人知道它要去哪里。",
}


def test_the_languages_of_sentences_are_found():
    found = {code: identify_language(text)[0] for code, text in LANGUAGES.items()}
    assert found == dict(zip(LANGUAGES, LANGUAGES, strict=True))
    assert all(0 < identify_language(text)[1] <= 1 for text in LANGUAGES.values())


@pytest.mark.parametrize("text", ["", " \n", "12 34.5 !!!"])
def test_a_text_without_letters_has_no_language(text):
    assert identify_language(text) == ("und", 0.0)
    assert Language("en")(as_document(text)).rule == "language"


def test_labels_and_probabilities_are_those_of_py3langid():
    peer = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    random = np.random.default_rng(0)
    together = " ".join(LANGUAGES.values())
    texts = [*LANGUAGES.values(), "a", "Ω", "THE QUICK", "cafe\u0301", "x" * 4000, "\U0001f600 ok"]
    for size in random.integers(1, 300, 60):
        start = int(random.integers(len(together)))
        texts += [together[start : start + size] + "a", "".join(map(chr, random.integers(0x61, 0x3000, size))) + "a"]
    for text in texts:
        label, probability = peer.classify(text)
        assert identify_language(text) == (label, pytest.approx(probability, rel=1e-3))


def test_the_language_is_kept_or_removed_and_written_down():
    step = Language(("en", "de"), min_score=0.9)
    kept = step(as_document(LANGUAGES["de"] * 3))
    assert kept.metadata["language"] == "de"
    assert kept.metadata["language_score"] > 0.9
    removed = step(as_document(LANGUAGES["fr"]))
    assert (removed.rule, removed.value, removed.limit) == ("language", "fr", "en, de")
    assert Language(())(as_document(LANGUAGES["ko"] + "\ud800")).metadata["language"] == "ko"
    assert Language("en", min_score=1.0)(as_document("Ok then la")).rule in ("language", "language_score")
    long = LANGUAGES["fr"] * 50 + LANGUAGES["en"] * 100 + LANGUAGES["fr"] * 50
    assert identify_language(long)[0] == "en"  # the middle is looked at, not menu and footer
    with pytest.raises(ConfigurationError, match="two lower-case letters"):
        Language("english")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cafe\u0301", "café"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("no\x00 \x07bell\x7f\u200b\ufeff", "no bell"),
        ("CafÃ© â€“ naÃ¯ve", "Café – naïve"),
        ("Ã is a letter, and so is Â.", "Ã is a letter, and so is Â."),
        ("a  \n\n\n\n\n b", "a\n\n b"),
        ("one \ud800 half", "one  half"),
        ("नमस्\u200dते क्\u200cष", "नमस्\u200dते क्\u200cष"),
        ("def f():\n    return 1\n", "def f():\n    return 1"),
        ("", ""),
    ],
)
def test_normal_form(text, expected):
    assert normalize_text(text) == expected
    assert normalize_text(expected) == expected
    assert NormalizeText()(as_document(text)).text == expected


def test_normal_form_by_choice():
    rules = NormalizeText(form="NFKC", collapse_spaces=True, mojibake=False, control_characters=True)
    assert normalize_text("ﬁne \t x\x07 Ã©", rules) == "fine x\x07 Ã©"
    document = as_document("already normal")
    assert NormalizeText()(document) is document


def test_listed_words_are_whole_words_and_phrases(tmp_path):
    assert count_listed("Bad, BAD badly bäd ba d", ["bad"]) == 2
    assert count_listed("very bad. Very... bad!", ["very bad", "", "absent"]) == 2
    (tmp_path / "list.txt").write_text("bad\nvery ugly\n\n")
    step = WordList(path=str(tmp_path / "list.txt"), words=("worse",), max_listed=1)
    assert step(as_document("one bad word")).text == "one bad word"
    removed = step(as_document("a bad and very ugly thing"))
    assert (removed.rule, removed.value, removed.limit) == ("listed_words", 2, 1)
    share = WordList(words=("bad",), max_listed=None, max_listed_per_word=0.1)
    assert share(as_document("bad " + "good " * 20)).text
    assert share(as_document("bad good")).rule == "listed_words_per_word"
    with pytest.raises(ConfigurationError, match="WordList needs path="):
        WordList()
    with pytest.raises(DataError, match="cannot be read"):
        WordList(path=str(tmp_path / "none.txt"))(as_document("x"))


def test_a_bloom_filter_keeps_its_error_rate(tmp_path):
    known = BloomFilter(5000, 0.02)
    known.add(f"text {number}" for number in range(5000))
    assert all(f"text {number}" in known for number in range(5000))
    wrong = np.mean([f"other {number}" in known for number in range(20_000)])
    assert 0.005 < wrong < 0.025  # 0.02 and three standard errors of 20,000 draws
    known.save(tmp_path / "known.bloom")
    loaded = BloomFilter.load(tmp_path / "known.bloom")
    assert [f"other {n}" in loaded for n in range(500)] == [f"other {n}" in known for n in range(500)]
    assert BloomFilter(10, 1e-9).add_new(["a", "b", "a", "\ud800"]) == [True, True, False, True]
    step = KnownTexts(str(tmp_path / "known.bloom"))
    assert step(as_document("text 7")).rule == "known_text"
    assert step(as_document("a new text of today")).text
    (tmp_path / "wrong.bloom").write_bytes(b"")
    with pytest.raises(DataError, match="is no Bloom filter"):
        BloomFilter.load(tmp_path / "wrong.bloom")
    with pytest.raises(ConfigurationError, match="error_rate=1"):
        BloomFilter(10, 1.0)


QUESTION = "A train leaves the station at nine and travels sixty miles an hour until it meets another train"


def naive_overlap(item: str, text: str, n: int) -> float:
    def grams(words, size):
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    words = item.lower().split()
    size = min(n, len(words))
    return len(grams(words, size) & grams(text.lower().split(), size)) / len(grams(words, size))


def test_contamination_names_the_item_and_its_fraction():
    items = ["too short", "eight words make the whole of this item", QUESTION]
    index = EvaluationIndex(items, ngram=13)
    assert (index.num_items, index.num_skipped) == (3, 1)
    for text in (f"before {QUESTION} after", QUESTION[:80], " ".join(QUESTION.split()[:14]), "nothing of it"):
        found, expected = index.find(text), naive_overlap(QUESTION, text, 13)
        assert (found.overlap if found else 0) == pytest.approx(expected)
    assert index.find(f"x {items[1].upper()}! y").item == 1
    assert index.find(f"{' '.join(QUESTION.split()[:13])} and {items[1]}").item == 1  # the larger fraction
    assert index.find("") is None


def test_contaminated_documents_are_removed(tmp_path):
    (tmp_path / "set.jsonl").write_text(f'{{"question": "{QUESTION}?"}}\n{{"question": "short"}}\n')
    step = Decontaminate(Files(str(tmp_path / "set.jsonl"), field="question"))
    removed = step(as_document(f"Homework: {QUESTION.upper()}"))
    assert isinstance(removed, Removed)
    assert (removed.rule, removed.value) == ("contaminated", 1.0)
    assert removed.limit.startswith("item 0: A train leaves")
    clean = as_document("A train leaves the station at ten.")
    assert step(clean) is clean
    lenient = Decontaminate(Texts([QUESTION]), max_overlap=0.5)
    assert lenient(as_document(" ".join(QUESTION.split()[:13]))).text
    with pytest.raises(ConfigurationError, match="Lower min_words"):
        Decontaminate(Texts(["short"]))(clean)
