"""Source code in pages: `{{ source PATH NAME }}` shows an object of a file as it is today, so it cannot go stale."""

import ast
from pathlib import Path

__all__ = ["ROOT", "exported", "fenced", "lines_of", "packages"]

ROOT = Path(__file__).resolve().parents[2]
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".md": "markdown"}
_MAPPED = ("callbacks", "strategies")


def fenced(path: str, name: str = "") -> str:
    """Return a fenced block with the source of an object, or with a whole file.

    Args:
        path: File, relative to the root of the checkout.
        name: Function, class, `Class.method` or assigned name; the whole file by default.

    Raises:
        ValueError: If the file or the object does not exist.
    """
    file = ROOT / path
    if not file.is_file():
        raise ValueError(f"{path} does not exist in {ROOT}; correct the path in the page.")
    text = file.read_text(encoding="utf-8")
    first, last = lines_of(text, name, path) if name else (1, len(text.splitlines()))
    shown = "\n".join(text.splitlines()[first - 1 : last])
    title = f"{path}, {name}" if name else path
    return f'````{_LANGUAGES[file.suffix]} title="{title}" linenums="{first}"\n{shown}\n````'


def lines_of(text: str, name: str, path: str) -> tuple[int, int]:
    """Return the first and the last line of an object in a Python file, decorators included.

    Args:
        text: Source of the file.
        name: Dotted name of the object inside the file.
        path: File name for the error.

    Raises:
        ValueError: If no object has that name.
    """
    body, found = ast.parse(text).body, None
    for part in name.split("."):
        found = next((node for node in body if part in _names(node)), None)
        if found is None:
            raise ValueError(f"{path} has no {name!r}; correct the name in the page.")
        body = getattr(found, "body", [])
    assert found is not None
    decorators = [decorator.lineno for decorator in getattr(found, "decorator_list", ())]
    return min([found.lineno, *decorators]), found.end_lineno or found.lineno


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def packages() -> dict[str, Path]:
    """Return the `__init__.py` of each package that exports names, by dotted name."""
    files = [*(ROOT / "lightning_lm").glob("*/__init__.py"), *(ROOT / name / "__init__.py" for name in _MAPPED)]
    named = {f"lightning_lm.{file.parent.name}": file for file in files if file.parent.name not in ("cli", "storage")}
    return {name: named[name] for name in sorted(named)}


def exported(file: Path) -> list[str]:
    """Return the names in `__all__` of a file.

    Args:
        file: Path of the file.
    """
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and "__all__" in _names(node):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []
