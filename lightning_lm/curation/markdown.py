"""Markdown from the reduced HTML that Resiliparse writes: headings, paragraphs, lists, code, line breaks and links."""

import html
import re

__all__ = ["markdown_of"]

_CODE = re.compile(r"<pre>(.*?)</pre>", re.DOTALL)
_RULES = (
    (re.compile(r"<li>\s*<p>"), "<li>"),
    (re.compile(r"<h([1-6])>\s*(.*?)\s*</h\1>", re.DOTALL), lambda found: f"\n\n{'#' * int(found[1])} {found[2]}\n\n"),
    (re.compile(r'<a href="([^"]*)">(.*?)</a>', re.DOTALL), r"[\2](\1)"),
    (re.compile(r"<br>\n?"), "  \n"),
    (re.compile(r"</p>"), "\n\n"),
    (re.compile(r"</?(?:p|[uo]l|li)>"), ""),
)
_LIST = re.compile(r"<(/?)([uo]l|li)>")


def markdown_of(markup: str) -> str:
    """Return reduced HTML as Markdown.

    Args:
        markup: HTML of headings, paragraphs, lists, code, line breaks and links.
    """
    pieces = _CODE.split(markup)
    parts: list[str] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append(f"\n\n{_fenced(html.unescape(piece).strip(chr(10)))}\n\n")
        else:
            parts.append(_prose(piece))
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).strip()


def _fenced(code: str) -> str:
    fence = "```"
    while fence in code:
        fence += "`"
    return f"{fence}\n{code}\n{fence}"


def _prose(markup: str) -> str:
    text = _marked_items(_RULES[0][0].sub("<li>", markup))
    for expression, replacement in _RULES[1:]:
        text = expression.sub(replacement, text)
    lines = (line.rstrip() if not line.endswith("  ") or not line.strip() else line for line in text.split("\n"))
    return html.unescape("\n".join(lines))


def _marked_items(markup: str) -> str:
    """Replace the beginnings of list items by their marks, indented by the depth of their list."""
    lists: list[int | None] = []
    parts: list[str] = []
    place = 0
    for tag in _LIST.finditer(markup):
        parts.append(markup[place : tag.start()].strip(" \n") if lists else markup[place : tag.start()])
        place = tag.end()
        closes, name = tag[1], tag[2]
        if name == "li":
            parts.append("" if closes else _mark(lists))
        elif not closes:
            lists.append(0 if name == "ol" else None)
        elif lists:
            lists.pop()
            parts.append("" if lists else "\n\n")
    return "".join([*parts, markup[place:]])


def _mark(lists: list[int | None]) -> str:
    number = lists[-1] if lists else None
    indent = "  " * max(0, len(lists) - 1)
    if number is None:
        return f"\n{indent}- "
    lists[-1] = number + 1
    return f"\n{indent}{number + 1}. "
