"""The chat page as text: one file that asks nothing of other servers. A browser drives it in another test."""

import re
import urllib.request

import pytest
from served_models import serving, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def response():
    with (
        serving(tiny_model(), tiny_tokenizer(), api_key="secret") as (url, _),
        urllib.request.urlopen(url) as answer,
    ):
        return answer.headers, answer.read().decode()


def test_page_needs_no_key_and_nothing_from_elsewhere(response):
    headers, page = response
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert re.findall(r"https?://|@import|<link(?! rel=\"icon\" href=\"data:)|<script src", page) == []
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_page_never_writes_text_as_markup(response):
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", response[1]) == []


def test_every_element_that_the_script_looks_up_is_there(response):
    page = response[1]
    looked_up = set(re.findall(r"\$\(\"([\w-]+)\"\)", page))
    assert looked_up
    assert looked_up <= set(re.findall(r"id=\"([\w-]+)\"", page))
