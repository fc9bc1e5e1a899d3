"""The verb that opens the documentation that was built in this checkout, or prints how to build it."""

import argparse
import webbrowser
from pathlib import Path

import lightning_lm

__all__ = ["add_arguments", "run"]

_BUILD = """\
The documentation is not built yet. In {root}:
  python -m pip install -e ".[docs]"
  python -m mkdocs build --strict
  lightning-lm docs"""
_INSTALLED = """\
This installation has no documentation: it belongs to the source. In a checkout of lightning-lm:
  python -m pip install -e ".[docs]"
  python -m mkdocs build --strict
  lightning-lm docs
Without it: lightning-lm --help, lightning-lm VERB --help, lightning-lm recipes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``lightning-lm docs``.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("page", nargs="?", default="index", help="page to open, as tutorials/pretrain (the first page)")
    parser.add_argument("--no-browser", action="store_true", help="print the address, and open nothing")


def run(arguments: argparse.Namespace) -> int:
    """Open the local build in the browser, or print the commands that make one.

    Args:
        arguments: Parsed arguments of `add_arguments`.

    Returns:
        0 if the page exists, 1 otherwise.
    """
    root = Path(lightning_lm.__file__).resolve().parents[1]
    if not (root / "mkdocs.yml").is_file():
        print(_INSTALLED)
        return 1
    site = root / "build" / "site"
    if not (site / "index.html").is_file():
        print(_BUILD.format(root=root))
        return 1
    page = site / f"{arguments.page.strip('/').removesuffix('.md').removesuffix('.html')}.html"
    if not page.is_file():
        pages = (path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html"))
        print(f"No page is called {arguments.page!r}. The pages are:\n  " + "\n  ".join(sorted(pages)))
        return 1
    print(page.as_uri())
    if not arguments.no_browser:
        webbrowser.open(page.as_uri())
    return 0
