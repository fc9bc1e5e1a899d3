"""The prose of the package: a docstring begins with a noun phrase or a verb, and so does the text of an argument."""

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lm.callbacks
import lightning_lm.strategies

ROOTS = (lightning_lm, lightning_lm.callbacks, lightning_lm.strategies)
FOLDERS = [Path(module.__file__).parent for module in ROOTS]
FILES = sorted({path for folder in FOLDERS for path in folder.rglob("*.py")})
CLAUSE = re.compile(r"(What|Which|How|Where|Whether|When|Who|Why|Of|Knows|Says|Tells|Chooses)\b")
RETIRED_WORDS = {
    "anew": "again",
    "behind": "after",
    "dull": "zero_variance",
    "earned": "reward",
    "enter": "copy_to",
    "fee": "kl_penalty",
    "hopeless": "unsupported",
    "hush": "silence",
    "leave": "reduce_from",
    "maps": "projections",
    "mend": "fix",
    "stretch": "shard_size",
    "summands": "partial_sums",
    "summed": "all_reduce",
    "trouble": "error",
    "turned": "rotated",
}
"""Words of earlier identifiers, each with the word of the field."""
RETIRED_PHRASES = re.compile(
    r"\b(number by number|summands?|shared out|dull groups?|hopeless|earned|comes? to no end|in vain|begins? anew"
    r"|on whose behalf|every rank must ask|learned tokens?|(?:nothing|something|what) is learned|ranks share"
    r"|(?:linear|input|output) maps?)\b",
    re.IGNORECASE,
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def texts(tree: ast.Module) -> Iterator[str]:
    """Yield each docstring, each argument's text and each docstring of an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring
            arguments = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", docstring, re.MULTILINE)
            if arguments:
                yield from re.findall(r"^ {4}\*{0,2}\w+: (.*)", arguments[1], re.MULTILINE)
        body = node.body if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) else []
        for before, after in itertools.pairwise(body):
            match before, after:
                case ast.Assign() | ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                    yield text


def test_the_package_is_found():
    assert len(FILES) > 200
    assert {path.parent.name for path in FILES} >= {"callbacks", "strategies", "functional"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_texts_begin_with_a_noun_phrase_or_a_verb(path):
    found = [text.splitlines()[0] for text in texts(ast.parse(path.read_text())) if CLAUSE.match(text)]
    assert found == []


def exports() -> dict[str, object]:
    """Return what each package exports, by its dotted name."""
    names = sorted(f"lightning_lm.{path.parent.name}" for path in FILES if path.name == "__init__.py")
    packages = [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]
    return {f"{package.__name__}.{name}": getattr(package, name) for package in packages for name in package.__all__}


def identifiers(name: str, value: object) -> Iterator[str]:
    """Yield the name of an export, of its public attributes, and of the parameters of its functions."""
    yield name.rpartition(".")[2]
    attributes = vars(value) if isinstance(value, type) and value.__module__.startswith("lightning_lm") else {}
    yield from (attribute for attribute in attributes if not attribute.startswith("_"))
    for function in (value, *attributes.values()):
        if inspect.isfunction(function):
            yield from inspect.signature(function).parameters


def words_of(identifier: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", identifier).lower()))


def test_exported_names_have_no_retired_words():
    found = {
        f"{name}: {identifier}": RETIRED_WORDS[word]
        for name, value in exports().items()
        for identifier in identifiers(name, value)
        for word in words_of(identifier) & RETIRED_WORDS.keys()
    }
    assert found == {}


def test_words_of_an_identifier():
    assert words_of("SummedTurned_2") == {"summed", "turned"}
    assert not words_of("return_leaves") & RETIRED_WORDS.keys()


def test_docstrings_of_exports_have_no_retired_phrases():
    found = []
    for name, value in exports().items():
        if not (inspect.isfunction(value) or isinstance(value, type)):
            continue
        members = [member for member in vars(value).values() if callable(member)] if isinstance(value, type) else []
        for documented in (value, *members):
            text = " ".join((getattr(documented, "__doc__", None) or "").split())
            found += [f"{name}: {match[0]}" for match in RETIRED_PHRASES.finditer(text)]
    assert found == []
