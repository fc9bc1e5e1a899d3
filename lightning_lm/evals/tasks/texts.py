"""Published tasks on running text: LAMBADA (Paperno et al. 2016, arXiv:1606.06031) and WikiText (arXiv:1609.07843)."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from lightning_lm.data.decoding import decoded, split
from lightning_lm.data.formats import format_of
from lightning_lm.data.records import BadRecords, Place, Placed, read_records
from lightning_lm.evals.tasks.continuation import ContinuationTask
from lightning_lm.evals.tasks.perplexity_task import PerplexityTask

__all__ = ["LAMBADA", "WikiText", "detokenized"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAMBADA(ContinuationTask):
    """The last word of a passage, which is hard to guess from its last sentence alone.

    Reads the authors' plain text, one passage a line, and the JSON lines and tables in which OpenAI's variant is known.
    """

    name: str = "lambada"
    subset: tuple[str, ...] = ("lambada_test_en.jsonl", "lambada_test.jsonl", "default/")
    question: str = "{{ text.split(' ')[:-1] | join(' ') }}"
    target: str = "{{ text.split(' ')[-1] }}"

    hub: ClassVar[str] = "EleutherAI/lambada_openai"
    folders: ClassVar[tuple[str, ...]] = ("lambada_openai", "lambada-dataset")

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the passages."""
        for path in self.files(split, text=True):
            yield from _lines_or_records(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WikiText(PerplexityTask):
    """Perplexity of articles of Wikipedia, whose spaced punctuation is put back; counted in the original text.

    Reads ``wiki.test.raw``, tables with one line a row (``text``), and tables with one article a row (``page``).
    """

    name: str = "wikitext"
    subset: tuple[str, ...] = ("wikitext-2-raw-v1", "wikitext-2-raw")
    question: str = "{{ detokenized }}"
    original: str = "{{ page }}"

    hub: ClassVar[str] = "EleutherAI/wikitext_document_level"
    folders: ClassVar[tuple[str, ...]] = ("wikitext-2-raw-v1", "wikitext-2-raw")

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the articles."""
        for path in self.files(split, text=True):
            records = _lines_or_records(path)
            first = next(records, None)
            if first is None:
                continue
            rest = (placed for part in ([first], records) for placed in part)
            yield from rest if "page" in first.record else _articles(rest)

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with its text without the spaces of tokenization."""
        return {**record, "detokenized": detokenized(str(record.get("page", "")))}


def _lines_or_records(path: Any) -> Iterator[Placed]:
    if format_of(path).name != "text":
        yield from (Placed(place, record) for place, record in read_records(path, BadRecords()))
        return
    for number, line in enumerate(split(decoded(path, None), "\n", path), start=1):
        if line:
            yield Placed(Place(str(path), f"line {number}"), {"text": line})


def _articles(lines: Iterable[Placed]) -> Iterator[Placed]:
    """Yield articles put together from lines: each begins with its title between single equals signs."""
    begun: Placed | None = None
    texts: list[str] = []
    for placed in lines:
        text = placed.record.get("text", "")
        if re.fullmatch(r"\s*= [^=].*[^=] =\s*", text) and begun is not None and "".join(texts).strip():
            yield Placed(begun.place, {"page": "".join(texts)})
            begun, texts = None, []
        begun = begun or placed
        texts.append(text if text.endswith("\n") or not text else f"{text}\n")
    if begun is not None and "".join(texts).strip():
        yield Placed(begun.place, {"page": "".join(texts)})


_REPLACED = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_ENCLOSED = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_LAST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenized(text: str) -> str:
    """Return a text of WikiText without the spaces around punctuation, in the order of steps that others use.

    Args:
        text: An article.
    """
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for pattern, new in _ENCLOSED:
        text = re.sub(pattern, new, text)
    for old, new in _LAST:
        text = text.replace(old, new)
    return text
