"""HTML reports against html.parser, an XML parser and coordinates computed by hand."""

import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from lightning_lm.html_report import (
    Bar,
    Html,
    Series,
    bar_chart,
    code,
    element,
    figures,
    histogram,
    line_chart,
    page,
    prose,
    section,
    table,
    ticks,
    tiles,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></td><img src=x onerror=alert(1)>",
    "\"' onmouseover='x' \"",
    "&lt;b&gt; &amp;",
    "<!-- ]]> --> <style>*{display:none}</style>",
    "\x00\x1b[2J\ud800\ufffe end",
    "\u202e reversed",
]


class Reader(HTMLParser):
    """The elements, attributes and text of a page as a browser would get them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def seen(text):
    return "".join("\ufffd" if c in "\x00\x1b\ud800\ufffe" else c for c in text)


@pytest.mark.parametrize("text", HOSTILE)
def test_untrusted_text_is_only_text_wherever_it_stands(text):
    charts = figures(
        line_chart(text, [Series(text, [0, 1], [2, 3]), Series(text, [0], [1])], x_label=text, y_label=text),
        histogram(text, [1], [0, 1], x_label=text),
        bar_chart(text, [Bar(text, 1, text)]),
    )
    blocks = [table([text], [[text]], caption=text), code(text), prose(text), tiles([(text, text)]), charts, text]
    whole = page(text, section(text, *blocks), subtitle=text, footer=text)
    whole.encode("utf-8")
    reader = Reader(whole)
    assert reader.open == []
    assert not {"script", "img", "b"} & set(reader.tags)
    assert reader.tags.count("style") == 1
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    assert (
        reader.text.count(seen(text)) == 28
    )  # title 2, frame 2, heading, text, table 3, code, prose, tiles 2, charts 10 + 2 + 3
    assert any(name == "aria-label" and seen(text) in value for _, name, value in reader.attributes)


def test_a_page_loads_nothing_and_says_so():
    reader = Reader(page("t", line_chart("a", [Series("b", [0, 1], [2, 3])])))
    assert not {name for _, name, _ in reader.attributes} & {"src", "href", "srcset", "data", "action"}
    policy = next(value for _, name, value in reader.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    assert "url(" not in page("t")
    assert "@import" not in page("t")
    assert "http" not in page("t").replace("http-equiv", "")


def test_markup_is_kept_and_nested_once():
    assert element("p", Html("<b>x</b>"), "<i>") == "<p><b>x</b>&lt;i&gt;</p>"
    assert element("td", 1.23456, class_="number", data_x='a"b') == '<td class="number" data-x="a&quot;b">1.235</td>'


def svg_of(figure):
    return ElementTree.fromstring(figure).find("svg")


def path_of(figure, index=0):
    return [path.get("d") for path in svg_of(figure).iter("path")][index]


def test_a_line_lies_at_the_coordinates_of_its_values():
    """The plot is 46..350 by 172..8 pixels; values 0..4 have the axis 0..4, so 1 lies a quarter of 164 above 172."""
    figure = line_chart("loss", [Series("train", [0, 5, 10], [4, 1, 0])])
    assert path_of(figure) == "M46 8 L198 131 L350 172"
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in svg_of(figure).iter("circle")]
    assert circles == [(46, 8), (198, 131), (350, 172)]
    labels = {text.text for text in svg_of(figure).iter("text")}
    assert {"0", "1", "2", "3", "4", "10"} <= labels


def test_logarithmic_axes():
    figure = line_chart("loss", [Series("train", [0, 1, 10, 100], [1, 1, 10, 100])], log_x=True, log_y=True)
    assert path_of(figure) == "M46 172 L198 90 L350 8"  # x=0 has no logarithm


def test_values_that_are_not_finite_leave_a_gap():
    figure = line_chart("loss", [Series("train", [0, 1, 2, 3], [0, float("nan"), 4, float("inf")])])
    assert path_of(figure) == "M46 172 M350 8"
    assert "no values" in line_chart("loss", [Series("train", [1], [float("nan")])])
    assert "no values" in line_chart("loss", [])


def test_one_value_and_equal_values_have_an_axis():
    assert path_of(line_chart("a", [Series("b", [3], [2.0])])) == "M198 90"
    assert path_of(line_chart("a", [Series("b", [0, 1], [0, 0])])) == "M46 90 L350 90"


def test_a_long_curve_is_thinned_and_keeps_its_spike():
    y = np.zeros(100_000)
    y[54_321] = 1.0
    path = path_of(line_chart("a", [Series("b", range(100_000), y)]))
    assert path.count("L") < 400
    assert " 8 " in path  # the top of the plot


def test_histogram_bars_lie_on_their_edges():
    """Four units on 304 pixels: 76 each; the largest of the axis 0..4 is as high as the plot."""
    figure = histogram("lengths", [4, 0, 1], [0, 1, 3, 4])
    rects = [tuple(float(r.get(k)) for k in ("x", "y", "width", "height")) for r in svg_of(figure).iter("rect")]
    assert rects == [(46, 8, 75, 164), (122, 172, 151, 0), (274, 131, 75, 41)]
    with pytest.raises(ValueError, match="3 counts need 4 ascending edges; got 3"):
        histogram("a", [1, 2, 3], [0, 1, 2])


def test_bars_are_as_long_as_their_values():
    rows = ElementTree.fromstring(bar_chart("a", [Bar("x", 4), Bar("y", 1, "25 %"), Bar("z", 0)])).iter("tr")
    widths = [None if (bar := row.find(".//div")) is None else bar.get("style") for row in rows]
    assert widths == ["width:100%", "width:25%", None]
    with pytest.raises(ValueError, match="'x' has the value -1"):
        bar_chart("a", [Bar("x", -1)])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.3, 4.1, [0, 1, 2, 3, 4, 5]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (998, 1002, [998, 999, 1000, 1001, 1002]),
        (0, 4e-7, [0, 1e-7, 2e-7, 3e-7, 4e-7]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_table_aligns_numbers_and_refuses_rows_of_another_length():
    made = table(["name", "count"], [["a", 1000], ["b", None], ["c", np.int64(3)], ["d", np.float64(0.5)]])
    cells = [(cell.get("class"), cell.text) for cell in ElementTree.fromstring(made).iter("td")]
    assert cells[1::2] == [("number", "1,000"), ("number", "-"), ("number", "3"), ("number", "0.5")]
    with pytest.raises(ValueError, match="Row 1 has 1 cells; the table has 2 columns"):
        table(["a", "b"], [[1, 2], [3]])


def test_series_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="'b' has 2 positions and 1 values"):
        line_chart("a", [Series("b", [0, 1], [1])])
