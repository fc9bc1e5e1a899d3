"""Check of the built site: every link and anchor leads somewhere, and no page loads anything from the network.

`python docs/hooks/check.py build/site` prints what is wrong, and exits with 1 if anything is.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_LOADED_BY_LINK = {"stylesheet", "icon", "preload", "preconnect", "manifest", "modulepreload"}


class _Page(HTMLParser):
    """Links, ids and resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in _LOADED and _LOADED[tag] in found:
            self.resources.append(found[_LOADED[tag]])
        if tag == "link" and _LOADED_BY_LINK & set(found.get("rel", "").split()):
            self.resources.append(found["href"])


def problems(site: Path) -> list[str]:
    """Return a line for each link that leads nowhere and each resource from elsewhere.

    Args:
        site: Folder of the built site.
    """
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site} has no pages; build it first"]
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        name = path.relative_to(site)
        found += [f"{name}: loads {address}" for address in page.resources if urlsplit(address).netloc]
        for address in {*page.links, *page.resources}:
            parts = urlsplit(address)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if parts.scheme or parts.netloc:
                continue
            if not target.exists():
                found.append(f"{name}: {address} does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{name}: {address} has no such anchor")
    for path in site.rglob("*.css"):
        if "url(http" in (text := path.read_text(encoding="utf-8")) or "url(//" in text:
            found.append(f"{path.relative_to(site)}: loads something from the network")
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]).resolve())
    sys.stdout.write("\n".join(wrong or ["All links lead somewhere; nothing is loaded from the network."]) + "\n")
    sys.exit(bool(wrong))
