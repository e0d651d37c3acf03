"""A report as one file of HTML: nothing is loaded from anywhere, and nothing runs in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

STYLE: Final = """
:root { color-scheme: light; --ink: #1f2933; --faint: #52606d; --line: #d9dee4; --good: #047857; --bad: #b91c1c;
  --small: #b45309; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .2rem 0; max-width: 60rem; }
.meta { color: var(--faint); font-size: .9rem; }
.outcome { font-weight: 600; margin: .8rem 0; }
.pass { color: var(--good); } .fail { color: var(--bad); } .small { color: var(--small); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0;
  border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; border-bottom-color: var(--faint); }
table.rows { table-layout: fixed; min-width: 60rem; }
.rows th:nth-child(1), .rows th:nth-child(2) { width: 15%; }
.rows th:nth-child(3) { width: 29%; } .rows th:nth-child(4) { width: 7%; } .rows th:nth-child(5) { width: 11%; }
table.rows td { overflow-wrap: anywhere; }
table.numbers { width: auto; }
.numbers th.number { white-space: normal; max-width: 9.5rem; }
td.verdict { font-weight: 600; white-space: nowrap; }
td.how { color: var(--faint); font-size: .85rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin-top: .2rem; font-size: .85rem; color: var(--faint); }
details ul { margin: .3rem 0; padding-left: 1.1rem; }
figure { margin: 1rem 0 1.8rem; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
figure svg { max-width: 100%; height: auto; display: block; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    return _tag("p", text, kind)


def _tag(name: str, text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<{name}{attribute}>{escape(text)}</{name}>"


def heading(text: str) -> str:
    return _tag("h2", text)


def cell(text: str, kind: str = "") -> str:
    return _tag("td", text, kind)


def table(kind: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table of the class `kind`: columns with their classes; rows of cells as `cell` makes them."""
    head = "".join(_tag("th", name, kind) for name, kind in columns)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="wide"><table class="{kind}">\n<tr>{head}</tr>\n{body}\n</table></div>'


def picture(caption: str, svg: str) -> str:
    return f"<figure>{_tag('figcaption', caption)}{svg}</figure>"


def facts(summary: str, items: Iterable[tuple[str, str]]) -> str:
    """Folded up: what was looked at. Items are a class and a text."""
    listed = "".join(_tag("li", text, kind) for kind, text in items)
    return f"<details>{_tag('summary', summary)}<ul>{listed}</ul></details>"
