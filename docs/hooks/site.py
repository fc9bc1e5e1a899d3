"""MkDocs hooks: macros in pages, the pages of the API reference, and one folder in which griffe finds every package."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import source
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

_MACRO = re.compile(r"^\{\{ (source|figure) (\S+)(?: (\S+))? \}\}$", re.MULTILINE)
_MACROS: dict[str, Callable[[str, str], str]] = {
    "source": source.fenced,
    "figure": lambda name, _: figures.figure(name),
}
_STAGE = tempfile.TemporaryDirectory(prefix="lightning-lm-docs-")
_SHIM = "https://unpkg.com/iframe-worker/shim"
_WORKER = "assets/worker.js"
_MODULES = ("errors", "protocols", "types", "distributed")


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """Point mkdocstrings at a folder that looks like the installed package.

    Args:
        config: Configuration of MkDocs.
    """
    package = Path(_STAGE.name) / "lightning_lm"
    if not package.exists():
        package.mkdir()
        mapped = [source.ROOT / name for name in ("callbacks", "strategies")]
        for entry in [*(source.ROOT / "lightning_lm").iterdir(), *mapped]:
            (package / entry.name).symlink_to(entry)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_STAGE.name]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each package, with everything that it exports.

    Args:
        files: Collection of the site's files.
        config: Configuration of MkDocs.
    """
    for name, names in _reference().items():
        files.append(File.generated(config, f"reference/{name.rpartition('.')[2]}.md", content=_page(name, names)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the macros of a page.

    Args:
        markdown: Text of the page.
        page: The page, named in errors.

    Raises:
        PluginError: If a macro names a file, an object or a figure that does not exist.
    """
    try:
        return _MACRO.sub(lambda found: _MACROS[found[1]](found[2], found[3] or ""), markdown)
    except ValueError as error:
        raise PluginError(f"{page.file.src_path}: {error}") from error


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Use the search worker of this site in place of one from the network.

    Args:
        output: HTML of the page.
        page: The page.
    """
    return output.replace(_SHIM, get_relative_url(_WORKER, page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    """Do the same in the page for addresses that do not exist.

    Args:
        output_content: HTML of the page.
    """
    return output_content.replace(_SHIM, f"/{_WORKER}")


def _reference() -> dict[str, list[str]]:
    packages = {name: source.exported(file) for name, file in source.packages().items()}
    modules = {f"lightning_lm.{name}": source.ROOT / "lightning_lm" / f"{name}.py" for name in _MODULES}
    return {
        **{name: names for name, names in packages.items() if names},
        **{name: source.exported(file) for name, file in modules.items()},
    }


def _page(package: str, names: list[str]) -> str:
    head = f"# {package}\n\n::: {package}\n    options:\n      members: false\n      show_root_heading: false\n"
    head += "      show_root_toc_entry: false\n"
    return "\n".join([head, *(f"::: {package}.{name}" for name in sorted(names, key=str.lower))]) + "\n"
