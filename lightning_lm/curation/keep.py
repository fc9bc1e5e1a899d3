"""Rules that decide which of several copies of a document is kept. None depends on the order of arrival."""

import dataclasses

from lightning_lm.curation.document import Document
from lightning_lm.errors import DataError
from lightning_lm.parts import Part

__all__ = ["KeepHighest", "KeepLongest", "KeepRule", "KeepShortest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepRule(Part):
    """Base of the rules. The copy with the highest priority is kept, of equal ones that with the smallest id."""

    def priority(self, document: Document) -> float:
        """Return the priority of a document among its copies.

        Args:
            document: The document.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepLongest(KeepRule):
    """Keeps the copy with the longest text."""

    def priority(self, document: Document) -> float:
        """Return the number of characters.

        Args:
            document: The document.
        """
        return len(document.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepShortest(KeepRule):
    """Keeps the copy with the shortest text, such as the one with least boilerplate."""

    def priority(self, document: Document) -> float:
        """Return the negative number of characters.

        Args:
            document: The document.
        """
        return -len(document.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepHighest(KeepRule):
    """Keeps the copy with the highest number in a field, such as the score of a quality classifier.

    Args:
        field: Name of a field of the metadata.
    """

    field: str = dataclasses.field(kw_only=False)

    def priority(self, document: Document) -> float:
        """Return the number.

        Args:
            document: The document.

        Raises:
            DataError: If the document has no number there.
        """
        value = document.metadata.get(self.field)
        if not isinstance(value, int | float):
            raise DataError(
                f"Document {document.id} has {value!r} in the field {self.field!r}, and KeepHighest needs a number. "
                "Name a field that a step before it writes, or use KeepLongest()."
            )
        return float(value)
