"""The crawl to try curation on: made of real text, always the same, and clean text that is not in it."""

import json

import pytest

from lightning_lm.cli import main
from lightning_lm.curation import Extract, Reading, sample_crawl

MODULES = [(f"m{number}", f'"""{f"Documentation {number} of a small module. " * 40}"""') for number in range(30)]


@pytest.fixture(autouse=True)
def _few_pages(monkeypatch):
    class Modules:
        def modules(self):
            return MODULES

    monkeypatch.setattr(sample_crawl, "StandardLibrary", Modules)
    monkeypatch.setattr(sample_crawl, "topics", {"topic": 'A <b> of "HTML" & more.\n\n' * 200})
    monkeypatch.setattr(sample_crawl, "_JUNK_PAGES", 3)
    monkeypatch.setattr(sample_crawl, "_COPIES", 2)


def test_the_verb_writes_the_same_pages_again_and_clean_text_apart_from_them(tmp_path, capsys):
    for name in ("one", "two"):
        assert main(["demo", "crawl", "--output", str(tmp_path / name)]) == 0
    assert "lightning-lm curate --config curation/web --input" in capsys.readouterr().out
    for name in ("crawl/pages.warc.gz", "held_out.jsonl", "good.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    pages = list(Reading().documents(tmp_path / "one" / "crawl" / "pages.warc.gz", "pages.warc.gz", "crawl"))
    texts = [Extract()(page).text for page in pages]
    clean = [json.loads(line)["text"] for line in (tmp_path / "one" / "held_out.jsonl").read_text().splitlines()]
    assert len(clean) == 3
    assert not set(clean) & set(texts)
    mirrors = [text for text in texts if "mirror" in text]
    assert len(mirrors) == 2 * 24
    assert any("BUY NOW" in text for text in texts)
    assert any('A <b> of "HTML" & more.' in text for text in texts)
    assert not any("We use cookies" in text for text in texts)


def test_pages_say_what_the_text_says():
    (text,) = {text for text in sample_crawl._texts() if "HTML" in text and len(text) < 3000} or {""}
    page = "".join(sample_crawl._paragraphs(text))
    assert sample_crawl._plain(page).replace("\n", "") == text.replace("\n", "")
