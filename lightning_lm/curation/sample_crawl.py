"""A small crawl to curate, made on any machine without a network: pages of real text, and everything else the web has.

The text is Python's own documentation: the language reference of ``pydoc`` and the docstrings of the standard library.
It is put into pages with menus, advertisements and notices; a few pages are mirrored many times with small changes;
and beside them stand spam, placeholder text, lists of links and other languages. A part of the documentation is not in
the crawl but in two files of clean text: one to evaluate models on, and one that a quality classifier learns from.
"""

import ast
import gzip
import html
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from lightning_lm.data.standard_library import StandardLibrary
from lightning_lm.storage import replacing

__all__ = ["write_sample_crawl"]

_PAGE_CHARACTERS = 3000
_HELD_OUT, _GOOD = 0.1, 0.15
_MIRRORED, _COPIES = 24, 24
_JUNK_PAGES = 140
"""Pages of each kind of junk; farms of articles have twice as many."""
_VOCABULARY = {
    "thing": "home garden travel money health style kitchen fitness gadget wedding holiday beauty crypto pet car sofa "
    "phone recipe diet trick secret offer guide trend brand budget morning family neighbour expert",
    "praise": "amazing incredible stunning affordable exclusive ultimate proven effortless premium legendary cheap new",
    "which": "the this that your our every my no",
    "does": "changes improves saves replaces beats transforms deserves loves outshines buys wants has",
    "and": "and but so because although while since whenever before after",
    "lorem": "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore et "
    "dolore magna aliqua enim ad minim veniam quis nostrud exercitation ullamco laboris nisi aliquip ex ea commodo",
}
_FOREIGN = (
    "Die Stadt hat im Herbst beschlossen, die alte Brücke zu erneuern. Der Verkehr wird bis zum Frühjahr umgeleitet. "
    "Viele Anwohner haben sich über den Lärm beschwert, doch die Arbeiten gehen weiter.",
    "La ville a décidé cet automne de rénover le vieux pont. La circulation sera déviée jusqu'au printemps. Beaucoup "
    "d'habitants se plaignent du bruit, mais les travaux continuent. Une piste cyclable sera construite à la fin.",
    "La ciudad decidió en otoño renovar el viejo puente. El tráfico se desviará hasta la primavera. Muchos vecinos se "
    "quejan del ruido, pero las obras continúan. Al final se construirá un carril para bicicletas junto al río.",
    "De stad wil in het najaar de oude brug vernieuwen. Het verkeer wordt tot het voorjaar omgeleid. Veel bewoners "
    "klagen over het lawaai, maar het werk gaat door. Aan het eind komt er een fietspad langs de rivier.",
)
_BLOCK = re.compile(r"\n\s*\n")


def write_sample_crawl(folder: Path | str, *, seed: int = 0) -> dict[str, int]:
    """Write ``crawl/pages.warc.gz``, ``held_out.jsonl`` and ``good.jsonl`` into a folder.

    Args:
        folder: The folder.
        seed: Seed of the pages.

    Returns:
        Texts of each file.
    """
    draw = random.Random(seed)
    texts = list(_texts())
    draw.shuffle(texts)
    held_out, good = (round(fraction * len(texts)) for fraction in (_HELD_OUT, _HELD_OUT + _GOOD))
    pages = [_page(draw, _paragraphs(text)) for text in texts[good:]]
    pages += [_page(draw, _changed(draw, _paragraphs(text))) for text in texts[good : good + _MIRRORED] * _COPIES]
    junk: tuple[Callable[[random.Random], list[str]], ...] = (_article, _article, _offer, _lorem, _foreign, _links)
    pages += [_page(draw, make(draw)) for make in junk for _ in range(_JUNK_PAGES)]
    draw.shuffle(pages)
    folder = Path(folder)
    (folder / "crawl").mkdir(parents=True, exist_ok=True)
    clean = {"held_out.jsonl": texts[:held_out], "good.jsonl": texts[held_out:good]}
    for name, chosen in clean.items():
        lines = [json.dumps({"text": "\n\n".join(map(_plain, _paragraphs(text)))}) + "\n" for text in chosen]
        with replacing(folder / name) as file:
            file.write("".join(lines).encode())
    with replacing(folder / "crawl" / "pages.warc.gz") as file:
        for number, page in enumerate(pages):
            file.write(_record(f"https://site{number % 97}.example/page/{number}", page.encode()))
    return {"crawl/pages.warc.gz": len(pages), **{name: len(chosen) for name, chosen in clean.items()}}


def _texts() -> Iterator[str]:
    """Yield pieces of documentation of about the length of a page."""
    for text in [*topics.values(), *(_docstrings(source) for _, source in StandardLibrary().modules())]:
        piece: list[str] = []
        for block in _BLOCK.split(text):
            piece.append(block)
            if sum(map(len, piece)) > _PAGE_CHARACTERS:
                yield "\n\n".join(piece)
                piece = []
        if sum(map(len, piece)) > _PAGE_CHARACTERS // 4:
            yield "\n\n".join(piece)


def _docstrings(source: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text and len(text) > 60)


def _paragraphs(text: str) -> list[str]:
    """Return the HTML of paragraphs; those whose first line is indented, and sessions, keep their lines."""
    made = []
    for block in filter(str.strip, _BLOCK.split(text)):
        tag = "pre" if block[:2].isspace() or block.lstrip().startswith(">>>") else "p"
        made.append(f"<{tag}>{html.escape(block if tag == 'pre' else ' '.join(block.split()))}</{tag}>")
    return made


def _plain(paragraph: str) -> str:
    return html.unescape(re.sub(r"</?(?:p|pre)>", "", paragraph))


def _changed(draw: random.Random, paragraphs: Sequence[str]) -> list[str]:
    """Return a mirrored page: a notice of the mirror, and one word of the page exchanged."""
    words = _some(draw, "thing"), draw.randrange(1000)
    changed = [paragraph.replace(" the ", f" {draw.choice(('this', 'that', 'the'))} ", 1) for paragraph in paragraphs]
    return [f"<p>This page of the {words[0]} mirror {words[1]} is served to you by a friend.</p>", *changed]


def _some(draw: random.Random, kind: str) -> str:
    return draw.choice(_VOCABULARY[kind].split())


def _article(draw: random.Random) -> list[str]:
    return [f"<p>{' '.join(_sentence(draw) for _ in range(draw.randint(3, 6)))}</p>" for _ in range(draw.randint(4, 9))]


def _sentence(draw: random.Random) -> str:
    """Return a sentence of a farm of articles: as grammatical as most, varied and empty."""

    def thing() -> str:
        return f"{_some(draw, 'which')} {_some(draw, 'praise')} {_some(draw, 'thing')}"

    clauses = [f"{thing()} {_some(draw, 'does')} {thing()}" for _ in range(draw.randint(1, 2))]
    return f" {_some(draw, 'and')} ".join(clauses).capitalize() + draw.choice((".", ".", "!"))


def _offer(draw: random.Random) -> list[str]:
    line = f"{_some(draw, 'praise')} {_some(draw, 'thing')} sale"
    return [
        f"<p>BUY NOW {line} !!! ONLY ${draw.randrange(9, 99)} ... CLICK HERE ###</p>"
        for _ in range(draw.randint(20, 60))
    ]


def _lorem(draw: random.Random) -> list[str]:
    sentences = (
        " ".join(_some(draw, "lorem") for _ in range(12)).capitalize() + "." for _ in range(draw.randint(20, 50))
    )
    return ["<p>Lorem ipsum dolor sit amet.</p>", *(f"<p>{sentence}</p>" for sentence in sentences)]


def _foreign(draw: random.Random) -> list[str]:
    sentences = draw.choice(_FOREIGN).split(". ")
    return [f"<p>{'. '.join(draw.choices(sentences, k=4))}.</p>" for _ in range(draw.randint(4, 10))]


def _links(draw: random.Random) -> list[str]:
    return [f"<li>{_some(draw, 'thing')} {draw.randrange(100)}</li>" for _ in range(draw.randint(60, 200))]


def _page(draw: random.Random, paragraphs: Sequence[str]) -> str:
    """Return a page as it is served: menu, advertisement in the middle of the text, related pages, notice, script."""
    names = [_some(draw, "thing") for _ in range(8)]
    menu = "".join(f'<li class="menu-item"><a href="/{name}?ref=nav">{name.title()}</a></li>' for name in names)
    related = "".join(
        f'<a class="teaser" href="/{name}/{draw.randrange(10**6)}">{_sentence(draw)}</a>' for name in names[:3]
    )
    advert = (
        f'<div class="advert" id="ad-{draw.randrange(10**6)}"><a href="https://ads.example/?c={draw.randrange(10**9)}">'
    )
    middle = len(paragraphs) // 2
    body = [*paragraphs[:middle], f"{advert}{_sentence(draw)}</a></div>", *paragraphs[middle:]]
    tracker = draw.randrange(10**9)
    script = f"<script>window.dataLayer=window.dataLayer||[];function gtag(){{dataLayer.push({tracker})}}</script>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{names[0].title()}</title>{script}</head>'
        f'<body><nav class="navigation"><ul>{menu}</ul></nav><main><article>{"".join(body)}</article></main>'
        f'<aside class="sidebar">{related}</aside><footer><p>We use cookies. Accept all | Reject all</p>'
        f"<p>&copy; {draw.randint(1999, 2026)} {names[0].title()} Media, all rights.</p></footer></body></html>"
    )


def _record(url: str, page: bytes) -> bytes:
    """Return a response of a WARC file, packed by itself, as web archives are."""
    response = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page
    header = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(response)}\r\n\r\n"
    )
    return gzip.compress(header.encode() + response + b"\r\n\r\n", compresslevel=6, mtime=0)
