"""Parts of an HTML page that stands alone and that everybody can read.

It fits wide and narrow screens, light and dark, the keyboard and screen readers. are images inside
the file with a text in place of them; they keep their white ground in the dark. Tables scroll
within themselves where the screen is narrow.
"""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_KINDS: Final = {".svg": "image/svg+xml", ".png": "image/png"}

_STYLE: Final = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1b1f23; --quiet: #4f5862;
  --line: #c9d1d9; --link: #0b4f9e; --card: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --text: #e9ecef; --quiet: #b4bcc6;
  --line: #444c56; --link: #8cb9ff; --card: #1f242a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1.25rem 3rem; background: var(--ground);
  color: var(--text); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
.verdict { font-size: 1.1rem; background: var(--card); border-left: .3rem solid var(--link);
  padding: .7rem 1rem; margin: 0 0 1rem; }
a { color: var(--link); }
a:focus-visible, .scroll:focus-visible { outline: .2rem solid var(--link); outline-offset: .15rem; }
.skip { position: absolute; left: -100rem; }
.skip:focus { position: static; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .2rem 1rem; }
dt { color: var(--quiet); }
dd { margin: 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; color: var(--quiet); padding-bottom: .4rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; white-space: nowrap; }
figure { margin: 1.2rem 0; }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: .3rem; }
figcaption { color: var(--quiet); font-size: .92rem; margin-top: .4rem; }
footer { margin-top: 3rem; color: var(--quiet); font-size: .92rem; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; its content is HTML."""

    title: str
    content: str

    @property
    def anchor(self) -> str:
        """Name by which links find the section."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def document(title: str, verdict: str, sections: Sequence[Section]) -> str:
    """Make the page: title, verdict, a list of links, and the sections."""
    links = "".join(
        f'<li><a href="#{part.anchor}">{html.escape(part.title)}</a></li>' for part in sections
    )
    body = "".join(
        f'<section aria-labelledby="{part.anchor}"><h2 id="{part.anchor}">'
        f"{html.escape(part.title)}</h2>{part.content}</section>\n"
        for part in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        '<a class="skip" href="#content">Skip to the content</a>'
        f'<header><h1>{html.escape(title)}</h1><p class="verdict">{html.escape(verdict)}</p>'
        f'</header>\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f'<main id="content">\n{body}</main>\n'
        "<footer>Made by scbert-scale; the figures lie beside this page as PNG and SVG.</footer>"
        "</body></html>\n"
    )


def paragraph(text: str) -> str:
    """Make a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def facts(values: Mapping[str, str]) -> str:
    """Make a list of names and values."""
    items = (
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in values.items()
    )
    return f"<dl>{''.join(items)}</dl>"


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table; its first column names the rows. Columns of numbers stand to the right."""
    numbers = [
        bool(rows) and all(re.fullmatch(r"[-\d.,%e+]*", row[column]) for row in rows)
        for column in range(len(heads))
    ]

    def cell(tag: str, column: int, text: str, more: str = "") -> str:
        kind = ' class="number"' if numbers[column] else ""
        return f"<{tag}{more}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", i, text, ' scope="col"') for i, text in enumerate(heads))
    body = "".join(
        "<tr>"
        + cell("th", 0, row[0], ' scope="row"')
        + "".join(cell("td", i, text) for i, text in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    label = html.escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(path: Path, spoken: str) -> str:
    """Put an image file into the page, with the text that says what it shows."""
    content = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(spoken, quote=True)
    return (
        f'<figure><img alt="{text}" src="data:{_KINDS[path.suffix]};base64,{content}">'
        f"<figcaption>{html.escape(spoken)}</figcaption></figure>"
    )
