"""Extraction of pages whose main text is known, Markdown of their structure, and running text of printed pages."""

import pytest

from lightning_lm.curation import Extract, ExtractMarkdown, ExtractPrecise, Removed, as_document
from lightning_lm.curation.markdown import markdown_of
from lightning_lm.curation.pages import text_of_pages
from lightning_lm.curation.reading.outcome import MEDIA_TYPE

PARAGRAPHS = [
    "The river rises in the hills to the north and runs through three towns before it meets the sea.",
    "Its water drove nine mills until the railway came; two of the wheels still turn on feast days.",
    "In spring the meadows beside it are under water, and herons stand where cattle graze in summer.",
]
CODE = "def depth(level):\n    if level < 3:\n        return level  # metres"
PAGE = f"""<html><head><title>The river &amp; its mills</title><style>p {{ color: red }}</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/a">About us</a></li></ul></nav>
<main><article><h1>The river</h1><p>{PARAGRAPHS[0]}</p><h2>Mills</h2><p>{PARAGRAPHS[1]}</p>
<pre>{CODE.replace("<", "&lt;")}</pre><p>{PARAGRAPHS[2]} <a href="http://maps.example/river">A map</a>.</p>
</article></main>
<footer>Copyright, all rights reserved, privacy policy</footer><script>track()</script></body></html>"""


def html(markup: str):
    return as_document(markup, "page.html", {MEDIA_TYPE: "text/html"})


@pytest.mark.parametrize("step", [Extract(), ExtractMarkdown(), ExtractPrecise()])
def test_the_main_text_is_whole_and_what_surrounds_it_is_gone(step):
    found = step(html(PAGE))
    assert all(paragraph in found.text for paragraph in PARAGRAPHS)
    assert all(line in found.text for line in CODE.split("\n"))
    assert not any(word in found.text for word in ("About us", "Copyright", "track", "color"))
    assert found.metadata == {"title": "The river & its mills"}
    assert (found.id, found.url) == (html(PAGE).id, "page.html")


def test_markdown_keeps_headings_lists_and_code():
    text = ExtractMarkdown(links=True)(html(PAGE)).text
    assert "# The river\n\n" in text
    assert "\n\n## Mills\n\n" in text
    assert f"\n\n```\n{CODE}\n```\n\n" in text
    assert "[A map](http://maps.example/river)" in text


def test_all_visible_text_and_links_are_kept_on_demand():
    assert "About us" in Extract(main_content=False)(html(PAGE)).text
    assert "http://maps.example/river" in Extract(links=True)(html(PAGE)).text


@pytest.mark.parametrize("tag", ["div", "b", "table"])
def test_a_page_nested_too_deep_is_removed_at_once(tag):
    removed = Extract()(html(f"<{tag}>" * 100_000 + "text" + f"</{tag}>" * 100_000))
    assert (removed.rule, removed.value, removed.limit) == ("nesting", 100_000, 512)
    assert isinstance(Extract()(html("<div>" * 100_000)), Removed)
    assert isinstance(Extract()(html("</div></p>" * 100_000 + "<DIV class=a></p>" * 600)), Removed)


@pytest.mark.parametrize("tag", ["p", "li", "br", "tr", "td", "dd"])
def test_elements_that_end_where_the_next_begins_are_not_nested(tag):
    assert "last" in Extract(main_content=False)(html(f"<{tag}>some text\n" * 600 + "last")).text


def test_pages_without_text_are_removed_and_plain_text_passes():
    for markup in ("", "<html><body></body></html>", "<script>x</script>", "\0\0"):
        assert Extract()(html(markup)).rule == "no_text"
    plain = as_document("plain < text")
    assert Extract()(plain) is plain


def test_pages_lose_headers_and_footers_and_divided_words_are_joined():
    lines = [
        "The depth of the water was meas-",
        "ured each day at the well-",
        "known post beside the old bridge",
        "over the river.",
        "",
        "- a list of short items",
        "- that stay on their lines",
    ]
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    pages = [
        [
            "The River Handbook",
            *(lines if number == 1 else [f"A well-known {words[number]} is", f"a {words[number]} of the field."]),
            f"Page {number} of 9",
        ]
        for number in range(1, 10)
    ]
    text = text_of_pages("\f".join("\n".join(page) for page in pages))
    assert "Handbook" not in text
    assert "Page" not in text
    assert "was measured each day at the well-known post beside the old bridge" in text
    assert "- a list of short items\n- that stay on their lines" in text


def test_a_paragraph_continues_on_the_next_page():
    first = "It was the best of rivers that anybody had seen in the whole of the wide\ncountry that lay between"
    assert "lay between the hills" in text_of_pages(f"{first} and between\fthe hills and the sea.").replace(
        "and between ", ""
    )
    assert text_of_pages("") == ""


def test_markdown_of_lists_numbers_items_and_indents_inner_lists():
    markup = "<p>Text &lt;</p>\n\n<ol>\n <li>one</li>\n <li>two\n<ul>\n <li>inner</li>\n</ul></li>\n</ol>\n<p>end</p>"
    assert markdown_of(markup) == "Text <\n\n1. one\n2. two\n  - inner\n\nend"
    assert markdown_of("<pre>a ``` b</pre>") == "````\na ``` b\n````"


def test_rows_of_a_table_are_no_running_lines():
    pages = [
        "\n".join([f"Yearbook {page}", "", *(f"{page}{row} 7 {row} 12.5" for row in range(4)), "", f"{page} / 9"])
        for page in range(9)
    ]
    found = text_of_pages("\f".join(pages))
    assert [f"{page}{row} 7 {row} 12.5" in found for page in range(9) for row in range(4)] == [True] * 36
    assert "Yearbook" not in found
    assert "/ 9" not in found
