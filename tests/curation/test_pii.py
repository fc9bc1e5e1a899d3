"""Masks of personal data: lists of what is and what is not, and time on text made to take long."""

import random
import time

import pytest

from lightning_lm.curation import (
    CardNumbers,
    Emails,
    Expression,
    IPAddresses,
    MaskPII,
    PhoneNumbers,
    as_document,
)
from lightning_lm.curation.pii import is_card_number
from lightning_lm.errors import ConfigurationError

FOUND = {
    Emails(): [
        "jo@example.org",
        "x.y+z@mail.co.uk",
        "a_b-c@x1.info",
        "J.O'Hara@sub.domain.museum",
        "m@xn--bcher-kva.de",
    ],
    PhoneNumbers(): [
        *("2831823829", "(283)-182-3829", "(283) 182 3829", "283-182-3829", "283.182.3829"),
        *("+1 (415) 555-2671", "1-800-555-0199", "+49 30 1234567", "+442071838750"),
    ],
    IPAddresses(): ["8.8.8.8", "1.1.1.1", "223.255.255.1", "2001:4860:4860::8888", "2606:4700:0:0:0:0:0:1111"],
    CardNumbers(): ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "6011000990139424"],
}
NOT_FOUND = [
    *("no@", "@no", "a@b", "me@localhost", "a@b.c1", "foo@bar..com", ".@x.org", "@property"),
    *(
        "1700000000",
        "12345678901234567890",
        "2020-10-12 10:20:30",
        "3.14159265358979",
        "978-3-16-148410-0",
        "1,234,567",
    ),
    *("999.1.1.1", "1.2.3.4.5", "v8.8.8.8", "12:30:45", "std::vector", "::", "a:b:c:d", "256.1.1.1"),
    *("4111 1111 1111 1112", "1234567812345670", "4111111111111111111111"),
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_personal_data_is_masked_wherever_it_stands(kind, text):
    for before, after in (
        ("", ""),
        ("Write to ", "."),
        ("(see: ", ", or call)"),
        ("\n", "\n"),
        ("<", ">"),
        ("ü ", " é"),
    ):
        assert kind.replace(before + text + after) == (f"{before}{kind.mask}{after}", 1)
    assert kind.replace(f"{text} {text}\n{text}") == (f"{kind.mask} {kind.mask}\n{kind.mask}", 3)


@pytest.mark.parametrize("text", NOT_FOUND)
def test_other_text_stays(text):
    document = as_document(f"Text {text} and more")
    assert MaskPII()(document) is document


def test_addresses_that_are_not_public_are_an_option():
    for address in ("192.168.1.1", "10.0.0.7", "127.0.0.1", "192.0.2.1", "2001:db8::1:2"):
        assert IPAddresses().replace(address) == (address, 0)
        assert IPAddresses(private=True).replace(address) == ("|||IP_ADDRESS|||", 1)


def test_masks_are_counted_and_never_masked_twice():
    text = " ".join(text for texts in FOUND.values() for text in texts)
    masked = MaskPII()(as_document(text))
    counts = {"emails": 5, "phone_numbers": 9, "ip_addresses": 5, "card_numbers": 4}
    assert masked.metadata == {f"masked_{kind}": count for kind, count in counts.items()}
    assert set(masked.metadata) == set(MaskPII().counts)
    assert MaskPII()(masked) is masked
    more = MaskPII()(as_document(masked.text + " jo@example.org", metadata=masked.metadata))
    assert more.metadata["masked_emails"] == 6


def test_expressions_of_the_user():
    step = MaskPII(kinds=(Expression(r"\bID-\d{4}\b", label="ids", mask=r"\1"),))
    masked = step(as_document("ID-1234 and ID-12345"))
    assert (masked.text, masked.metadata) == (r"\1 and ID-12345", {"masked_ids": 1})
    with pytest.raises(ConfigurationError, match="its own mask"):
        Expression("PII")
    with pytest.raises(ConfigurationError, match="an empty text"):
        Expression("x*")
    with pytest.raises(ConfigurationError, match="no regular expression"):
        Expression("(")


def test_the_check_digit_is_that_of_iso_7812():
    draw = random.Random(0)
    for _ in range(50):
        digits = [draw.randrange(10) for _ in range(draw.randint(12, 18))]
        total = sum(sum(divmod(2 * digit, 10)) if place % 2 == 0 else digit for place, digit in enumerate(digits[::-1]))
        right = -total % 10
        for last in range(10):
            assert is_card_number("".join(map(str, [*digits, last]))) == (last == right)


HOSTILE = [
    "@",
    "a",
    "a@",
    "a.",
    "a@a.",
    "+1",
    "1",
    "1 ",
    "(2",
    "4-",
    "1.1.1.1.",
    ":",
    "a:",
    "+1-1-1-1-1-1x",
    "f:f:f:",
    "a@b.",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_is_linear_on_text_made_to_take_long(piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    MaskPII()(as_document(text + "!"))
    assert time.process_time() - start < 60  # 0.1 s; an expression that backtracks takes hours
