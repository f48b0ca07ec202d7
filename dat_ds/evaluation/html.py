"""Parts of a page that needs nothing but itself: no network, no script, images inside.

Every function takes plain text and returns HTML in which it is escaped; only arguments called
``body`` are HTML already.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #ffffff; --tile: #f6f8fa;
  --ok: #1a6e3c; --suspicious: #8a5300; --failed: #b3261e; --skipped: #57606a; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --paper: #0d1117; --tile: #161b22;
  --ok: #5fd38d; --suspicious: #f0b352; --failed: #ff8a80; --skipped: #9da7b1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.soft, figcaption, caption, .note { color: var(--soft); }
.missing { color: var(--soft); }
.missing code { display: block; background: var(--tile); border: 1px solid var(--line);
  border-radius: .4rem; padding: .4rem .7rem; margin-top: .4rem; }
nav { font-size: .9rem; margin: .8rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: inherit; text-underline-offset: .15em; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible {
  outline: 2px solid currentColor; outline-offset: 2px; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem;
  margin: 1.1rem 0; padding: 0; }
.tiles div { background: var(--tile); border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem 1rem; }
.tiles dt { color: var(--soft); font-size: .88rem; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 1.75rem; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tiles .note { font-size: .85rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; font-size: .88rem; padding-bottom: .35rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom-width: 2px; font-weight: 600; }
th, td { overflow-wrap: break-word; }
td { min-width: 4rem; }
tbody th { font-weight: 500; min-width: 7rem; }
td.number + td, th.number + th { padding-left: .9rem; }
.long td { overflow-wrap: anywhere; }
.prose td { min-width: 9rem; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.status { font-weight: 650; white-space: nowrap; }
.status.ok { color: var(--ok); } .status.suspicious { color: var(--suspicious); }
.status.failed { color: var(--failed); } .status.skipped { color: var(--skipped); }
.banner { border: 1px solid currentColor; border-left-width: .4rem; border-radius: .4rem;
  padding: .6rem .9rem; margin: 1rem 0; }
.banner.suspicious { color: var(--suspicious); } .banner.failed { color: var(--failed); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 1rem; margin: .75rem 0; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: .4rem; }
figure.narrow { max-width: 44rem; }
figcaption { font-size: .86rem; margin-top: .35rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
pre { font: .8rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--tile); border: 1px solid var(--line);
  border-radius: .4rem; padding: .75rem; }
@page { margin: 16mm 15mm; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --tile: #fff;
    --ok: #1a6e3c; --suspicious: #8a5300; --failed: #b3261e; --skipped: #444; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2 { break-after: avoid; margin-top: 1.4rem; }
  figure, tr, .tiles div, .banner, .scroll { break-inside: avoid; }
  .scroll { overflow: visible; }
  .prose td { min-width: 0; }
  .figures { grid-template-columns: 1fr 1fr; }
  figure.narrow { max-width: 12cm; }
  .tiles { grid-template-columns: repeat(4, 1fr); gap: .4rem; }
  .tiles .value { font-size: 14pt; }
}
"""

_SIGNS = {"ok": "\u2713", "suspicious": "!", "failed": "\u2717", "skipped": "\u2013"}


def escape(text: Any) -> str:
    """Text as HTML, safe within an attribute too."""
    return html.escape(str(text), quote=True)


def note(text: str) -> str:
    """A paragraph of less weight."""
    return f'<p class="soft">{escape(text)}</p>'


def missing(text: str, command: str) -> str:
    """What is not there, and the command that makes it."""
    return f'<p class="missing">{escape(text)} <code>{escape(command)}</code></p>'


def banner(text: str, status: str) -> str:
    """A warning of the colour of a check's status."""
    return f'<p class="banner {escape(status)}" role="note">{escape(text)}</p>'


def tiles(entries: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Numbers at a glance: ``(label, value, notes)`` each."""
    boxes = [
        f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd>'
        + "".join(f'<dd class="note">{escape(note)}</dd>' for note in notes)
        + "</div>"
        for label, value, notes in entries
    ]
    return f'<dl class="tiles">{"".join(boxes)}</dl>'


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numbers: Collection[int] = (),
    status: int | None = None,
    kind: str = "",
) -> str:
    """A table whose first column names its rows.

    Args:
        caption: Above it.
        header: Names of the columns.
        rows: Their cells.
        numbers: Columns of numbers, set flush right.
        status: Column with the status of a check.
        kind: ``"long"`` for cells whose long words may break anywhere, ``"prose"`` for sentences.
    """
    kinds = ["number" if column in numbers else "" for column in range(len(header))]
    heads = "".join(
        f'<th scope="col"{_class(kind)}>{escape(name)}</th>'
        for name, kind in zip(header, kinds, strict=True)
    )
    lines = []
    for row in rows:
        cells = []
        for column, (cell, kind) in enumerate(zip(row, kinds, strict=True)):
            shown = _status(str(cell)) if column == status else escape(cell)
            opening = '<th scope="row"' if column == 0 else "<td"
            cells.append(f"{opening}{_class(kind)}>{shown}</{'th' if column == 0 else 'td'}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"<table{_class(kind)}><caption>{escape(caption)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def picture(png: bytes, alt: str, caption: str, kind: str = "") -> str:
    """A PNG inside the page.

    Args:
        png: The file's bytes.
        alt: What it shows, for readers who cannot see it.
        caption: Below it.
        kind: ``"narrow"`` for a figure that is not to fill the page.
    """
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure{_class(kind)}><img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def side_by_side(bodies: Sequence[str]) -> str:
    """Figures in two columns where there is room."""
    return f'<div class="figures">{"".join(bodies)}</div>'


def collapsed(summary: str, body: str) -> str:
    """Shown when the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def values_as_json(values: Mapping[str, Any]) -> str:
    """An object, indented."""
    return f"<pre>{escape(json.dumps(values, indent=2, ensure_ascii=False))}</pre>"


def section(key: str, title: str, body: str) -> str:
    """A section with its heading; ``key`` is its anchor."""
    name = escape(key)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{escape(title)}</h2>{body}</section>'
    )


def page(title: str, subtitle: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page.

    Args:
        title: In its heading and the window.
        subtitle: Below the heading.
        lead: HTML before the first section.
        sections: ``(key, title, body)`` each, of :func:`section`.
    """
    links = "".join(f'<a href="#{escape(key)}">{escape(name)}</a>' for key, name, _ in sections)
    parts = "".join(section(*entry) for entry in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p></header>'
        f'<main>{lead}<nav aria-label="Sections">{links}</nav>{parts}</main></body></html>\n'
    )


def _class(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""


def _status(status: str) -> str:
    sign = _SIGNS.get(status, "")
    return (
        f'<span class="status {escape(status)}"><span aria-hidden="true">{sign}</span> '
        f"{escape(status)}</span>"
    )
