"""The prose of the package: a docstring begins with a noun phrase or a verb, and so does the text of an argument."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lm.callbacks
import lightning_lm.strategies

FOLDERS = [Path(module.__file__).parent for module in (lightning_lm, lightning_lm.callbacks, lightning_lm.strategies)]
FILES = sorted({path for folder in FOLDERS for path in folder.rglob("*.py")})
CLAUSE = re.compile(r"(What|Which|How|Where|Whether|When|Who|Why|Of|Knows|Says|Tells|Chooses)\b")
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
