"""Masks for personal data: e-mail addresses, telephone and card numbers, IP addresses, and expressions of the user.

Each kind has a cheap test for text that cannot contain any, and expressions whose repetitions are bounded, so that no
text takes more than linear time. Masks contain nothing that another expression matches, and are never counted twice.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Callable

from lightning_lm.curation.document import Document, Removed
from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Part

__all__ = ["CardNumbers", "Emails", "Expression", "IPAddresses", "MaskPII", "PIIKind", "PhoneNumbers", "is_card_number"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PIIKind(Part):
    """Base of the kinds of personal data.

    Args:
        mask: Text that replaces each occurrence.
    """

    mask: str = "|||PII|||"

    @property
    def name(self) -> str:
        """Name of the kind in the counts, such as ``emails``."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def replace(self, text: str) -> tuple[str, int]:
        """Return the text with masks, and the number of occurrences.

        Args:
            text: Text of a document.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emails(PIIKind):
    """E-mail addresses."""

    mask: str = "|||EMAIL_ADDRESS|||"

    def replace(self, text: str) -> tuple[str, int]:
        """Return the text with masks, and the number of addresses. Only what surrounds an ``@`` is looked at.

        Args:
            text: Text of a document.
        """
        pieces, done, at = [], 0, text.find("@")
        while at >= 0:
            domain = _DOMAIN.match(text, at + 1)
            local = _REVERSED_LOCAL_PART.match(text[max(at - 65, done) : at][::-1]) if domain else None
            if domain and local:
                pieces += [text[done : at - local.end()], self.mask]
                done = domain.end()
            at = text.find("@", max(at + 1, done))
        return "".join([*pieces, text[done:]]), len(pieces) // 2


_REVERSED_LOCAL_PART = re.compile(r"(?!\.)[a-z0-9!#$%&'*+/=?^_`{}~.-]{0,63}[a-z0-9](?!\w)", re.I | re.A)
_DOMAIN = re.compile(
    r"(?:[a-z0-9][a-z0-9-]{0,62}\.){1,8}(?:[a-z]{2,63}|xn--[a-z0-9-]{1,59})(?![a-z0-9_-])", re.I | re.A
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPAddresses(PIIKind):
    """IP addresses, version 4 and 6.

    Args:
        private: Also mask addresses that are not public: private networks, loopback, and those of documentation.
    """

    mask: str = "|||IP_ADDRESS|||"
    private: bool = False

    def replace(self, text: str) -> tuple[str, int]:
        """Return the text with masks, and the number of addresses.

        Args:
            text: Text of a document.
        """
        text, count = _replace(_IPV4, self._is_wanted, self.mask, text)
        if _IPV6_HINT.search(text):
            text, more = _replace(_IPV6, self._is_wanted, self.mask, text)
            count += more
        return text, count

    def _is_wanted(self, word: str) -> bool:
        try:
            address = ipaddress.ip_address(word)
        except ValueError:
            return False
        return self.private or address.is_global


_IPV4 = re.compile(r"\d(?<![\w.].)\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\d)", re.A)
_IPV6_HINT = re.compile(r":[0-9a-f]{0,4}:[0-9a-f]{0,4}:", re.I | re.A)
_IPV6 = re.compile(r"[0-9a-f:](?<![\w:.].)[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){3,8}(?![\w:])", re.I | re.A)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardNumbers(PIIKind):
    """Numbers of payment cards, 13 to 19 digits of which the last is the check digit (ISO/IEC 7812)."""

    mask: str = "|||CARD_NUMBER|||"

    def replace(self, text: str) -> tuple[str, int]:
        """Return the text with masks, and the number of card numbers.

        Args:
            text: Text of a document.
        """
        return _replace(_CARD, is_card_number, self.mask, text)


_CARD = re.compile(r"[2-6](?<![\w.-].)(?:[ -]?\d){12,18}(?!\w|[.-]\d)", re.A)


def is_card_number(number: str) -> bool:
    """Return whether the check digit of a number is right (Luhn 1960).

    Args:
        number: Digits, separated or not.

    Example:
        >>> is_card_number("4111 1111 1111 1111"), is_card_number("4111 1111 1111 1112")
        (True, False)
    """
    digits = [int(character) for character in reversed(number) if character.isdigit()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhoneNumbers(PIIKind):
    """Telephone numbers: North American ones of ten digits, and international ones that begin with ``+``."""

    mask: str = "|||PHONE_NUMBER|||"

    def replace(self, text: str) -> tuple[str, int]:
        """Return the text with masks, and the number of telephone numbers.

        Args:
            text: Text of a document.
        """
        return _PHONE.subn(self.mask, text)


_PHONE = re.compile(
    r"""[+(\d](?<![\w+.(-].)(?:
      (?<=\+)[1-9](?:[ .-]?\(?\d\)?){6,14}
    | (?<=\()[2-9]\d{2}\)[ .-]{0,2}\d{3}[ .-]?\d{4}
    | (?<=[2-9])\d{2}[ .-]{0,2}\d{3}[ .-]?\d{4}
    | (?<=1)[ .-]?\(?[2-9]\d{2}\)?[ .-]{0,2}\d{3}[ .-]?\d{4}
    )(?!\w|[.-]\d)""",
    re.A | re.X,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expression(PIIKind):
    r"""Text that an expression of the user matches.

    Args:
        pattern: Regular expression of Python's ``re``. Bound its repetitions: ``\d{1,9}``, not ``\d+``.
        label: Name of the kind in the counts.

    Raises:
        ConfigurationError: If the expression is invalid, or matches its own mask or an empty text.
    """

    pattern: str = dataclasses.field(kw_only=False)
    label: str = "expressions"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            pattern = re.compile(self.pattern)
        except re.error as error:
            raise ConfigurationError(f"pattern={self.pattern!r} is no regular expression: {error}.") from error
        for text, meaning in (("", "an empty text"), (self.mask, f"its own mask {self.mask!r}")):
            if pattern.search(text):
                raise ConfigurationError(
                    f"pattern={self.pattern!r} matches {meaning}, so that masks would be masked again. "
                    "Change the pattern, or mask=."
                )

    @property
    def name(self) -> str:
        """The label."""
        return self.label

    def replace(self, text: str) -> tuple[str, int]:
        """Return the text with masks, and the number of matches.

        Args:
            text: Text of a document.
        """
        return re.subn(self.pattern, lambda _: self.mask, text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskPII(Part):
    """Replaces personal data by masks and counts them in the metadata, such as in the field ``masked_emails``.

    Args:
        kinds: Kinds of personal data, masked one after the other.

    Example:
        >>> from lightning_lm.curation import as_document
        >>> masked = MaskPII()(as_document("Write to jo@example.org or call (555) 283-1823."))
        >>> masked.text, dict(masked.metadata)
        ('Write to |||EMAIL_ADDRESS||| or call |||PHONE_NUMBER|||.', {'masked_emails': 1, 'masked_phone_numbers': 1})
    """

    kinds: tuple[PIIKind, ...] = (Emails(), IPAddresses(), CardNumbers(), PhoneNumbers())

    @property
    def counts(self) -> tuple[str, ...]:
        """Names of the metadata fields with counts."""
        return tuple(f"masked_{kind.name}" for kind in self.kinds)

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document with masks.

        Args:
            document: The document.
        """
        text, counts = document.text, dict[str, int]()
        for kind, field in zip(self.kinds, self.counts, strict=True):
            text, count = kind.replace(text)
            if count:
                counts[field] = counts.get(field, document.metadata.get(field, 0)) + count
        if not counts:
            return document
        return dataclasses.replace(document, text=text, metadata={**document.metadata, **counts})


def _replace(pattern: re.Pattern[str], is_wanted: Callable[[str], bool], mask: str, text: str) -> tuple[str, int]:
    """Replace the matches that a function confirms, and count them."""
    count = 0

    def mask_of(match: re.Match[str]) -> str:
        nonlocal count
        if not is_wanted(match[0]):
            return match[0]
        count += 1
        return mask

    return pattern.sub(mask_of, text), count
