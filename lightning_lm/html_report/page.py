"""Frame of a report: one HTML file that loads nothing, readable on a phone, in the light and in the dark."""

from lightning_lm.html_report.markup import Cell, Html, element

__all__ = ["page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Nothing is loaded and nothing runs, whatever the shown text contains."""

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1d1d1f; --soft: #5f6368; --line: #dcdcd8;
  --s0: #1f5fa8; --s1: #c2540a; --s2: #1a7f4b; --s3: #8b3fc7; --s4: #a3154a; --s5: #6b6b00; }
@media (prefers-color-scheme: dark) { :root { --page: #16171a; --card: #1f2125; --ink: #e8e8e6; --soft: #a2a6ad;
  --line: #3a3d43; --s0: #7fb3ee; --s1: #f0a468; --s2: #6fcf97; --s3: #c79bf2; --s4: #f08cae; --s5: #d4d05a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-size: 16px; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, .subtitle, figcaption small { color: var(--soft); }
code, pre { font-size: .85rem;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .5rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
mark { background: color-mix(in srgb, var(--s1) 28%, transparent); color: inherit; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; min-width: min(100%, 24rem); }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  unicode-bidi: isolate; }
th { font-weight: 600; color: var(--soft); }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
td:not(.number) { min-width: 5.8rem; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; }
.tiles dt { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: .8rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .7rem;
  max-width: 34rem; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .2rem; }
figcaption small { font-weight: 400; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem; color: var(--soft); list-style: none;
  margin: .2rem 0 0; padding: 0; }
.legend i { display: inline-block; width: .9rem; height: .25rem; border-radius: 2px; margin-right: .35rem;
  vertical-align: middle; }
.bars { width: 100%; font-size: .85rem; min-width: 0; }
.bars td { padding: .15rem .5rem .15rem 0; border: 0; overflow-wrap: anywhere; }
.bars .track { width: 45%; }
.bars .bar { background: var(--s0); border-radius: 2px; height: .8rem; margin-top: .25rem; min-width: 1px; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { body { background: #fff; } figure, section { break-inside: avoid-page; } }
"""


def page(title: str, *blocks: Cell, subtitle: str = "", footer: str = "") -> Html:
    """Return a whole page.

    Args:
        title: Title of the window and heading.
        *blocks: Results of `section`, `table`, `line_chart` and so on, in order; plain text is escaped.
        subtitle: Line below the heading.
        footer: Line at the end, such as the command and the version that wrote the page.

    Returns:
        Text of a file in UTF-8.

    Example:
        >>> from lightning_lm.html_report import page, prose
        >>> page("Run 3", prose("loss < 2")).startswith("<!doctype html>")
        True
    """
    head = "".join(
        [
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            element("title", title),
            f"<style>{_STYLE}</style>",
        ]
    )
    top = [element("h1", title)] + ([element("p", subtitle, class_="subtitle")] if subtitle else [])
    end = [element("footer", footer)] if footer else []
    body = element("body", element("main", *top, *blocks, *end))
    return Html(f'<!doctype html>\n<html lang="en"><head>{head}</head>{body}</html>\n')
