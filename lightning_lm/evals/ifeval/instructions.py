"""The 25 kinds of verifiable instruction of IFEval (Zhou et al. 2023, arXiv:2311.07911), each a function.

A check gets the response and the arguments that the published file gives in ``kwargs``. All are deterministic: there is
no sampling in the language identification, and sentences are told by punctuation.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from lightning_lm.errors import DataError
from lightning_lm.evals.ifeval.texts import capital_words, count_sentences, count_words, is_language, paragraphs
from lightning_lm.storage.json_text import parse_json

__all__ = ["INSTRUCTIONS", "follows"]

Check = Callable[..., bool]
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def follows(instruction: str, response: str, arguments: dict[str, Any]) -> bool:
    """Return whether a response follows an instruction; an empty response follows none.

    Args:
        instruction: Name of the kind, such as ``keywords:existence``.
        response: Text of the model.
        arguments: Arguments of the instruction; ``None`` values are passed over.

    Raises:
        DataError: If there is no such kind, or an argument is missing or unknown.
    """
    if instruction not in INSTRUCTIONS:
        raise DataError(f"There is no instruction {instruction!r}; there are {', '.join(sorted(INSTRUCTIONS))}.")
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        return bool(response.strip()) and INSTRUCTIONS[instruction](response, **given)
    except TypeError as error:
        raise DataError(f"The arguments {given} do not fit {instruction!r}: {error}.") from error


def _compare(number: float, relation: str, wanted: float) -> bool:
    if relation not in ("at least", "less than"):
        raise DataError(f"relation={relation!r} must be 'at least' or 'less than'.")
    return number >= wanted if relation == "at least" else number < wanted


def _keywords(response: str, *, keywords: Sequence[str]) -> bool:
    return all(re.search(re.escape(word), response, re.IGNORECASE) for word in keywords)


def _forbidden(response: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", response, re.IGNORECASE) for word in forbidden_words)


def _frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(re.escape(keyword), response, re.IGNORECASE)), relation, frequency)


def _letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(response.lower().count(letter.lower()), let_relation, let_frequency)


def _language(response: str, *, language: str) -> bool:
    return is_language(response, language)


def _num_sentences(response: str, *, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(response), relation, num_sentences)


def _num_words(response: str, *, num_words: int, relation: str) -> bool:
    return _compare(count_words(response), relation, num_words)


def _num_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    found = paragraphs(response, r"\s?\*\*\*\s?")
    return found is not None and len(found) == num_paragraphs


def _nth_paragraph(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    found = [piece for piece in re.split(r"\n\n", response) if piece.strip()]
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= len(found):
        return False
    word = found[nth_paragraph - 1].split()[0].lstrip("'\"“‘")  # noqa: RUF001
    return re.split(r"[.,?!'\"”’]", word)[0].lower() == first_word.lower()  # noqa: RUF001


def _placeholders(response: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def _postscript(response: str, *, postscript_marker: str) -> bool:
    forms = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = forms.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(rf"\s*{marker}.*$", response.lower(), re.MULTILINE) is not None


def _bullets(response: str, *, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", response, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", response, re.MULTILINE)) == num_bullets


def _constrained(response: str) -> bool:
    return any(choice in response.strip() for choice in CONSTRAINED)


def _highlights(response: str, *, num_highlights: int) -> bool:
    twice = [found for found in re.findall(r"\*\*([^\n\*]*)\*\*", response) if found.strip()]
    rest = re.sub(r"\*\*[^\n\*]*\*\*", "", response)
    once = [found for found in re.findall(r"\*([^\n\*]*)\*", rest) if found.strip()]
    return len(twice) + len(once) >= num_highlights


def _sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", response)) >= num_sections


def _json(response: str) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", response.strip(), flags=re.IGNORECASE).strip()
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _title(response: str) -> bool:
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", response))


def _two_responses(response: str) -> bool:
    found = paragraphs(response, r"\*\*\*\*\*\*")
    return found is not None and len(found) == 2 and found[0].strip() != found[1].strip()


def _repeat(response: str, *, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(response: str, *, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_frequency(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(capital_words(response), capital_relation, capital_frequency)


def _all_capital(response: str) -> bool:
    return response.isupper() and is_language(response.lower(), "en")


def _all_lower(response: str) -> bool:
    return response.islower() and is_language(response, "en")


def _no_comma(response: str) -> bool:
    return "," not in response


def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


INSTRUCTIONS: dict[str, Check] = {
    "change_case:capital_word_frequency": _capital_frequency,
    "change_case:english_capital": _all_capital,
    "change_case:english_lowercase": _all_lower,
    "combination:repeat_prompt": _repeat,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "keywords:existence": _keywords,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "length_constraints:number_paragraphs": _num_paragraphs,
    "length_constraints:number_sentences": _num_sentences,
    "length_constraints:number_words": _num_words,
    "punctuation:no_comma": _no_comma,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
}
"""The check of each kind of instruction."""
