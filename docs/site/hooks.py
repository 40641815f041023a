"""What MkDocs does beyond its settings: notebooks become pages, and every page has its place.

Nothing here draws or computes: a notebook is shown with the outputs that are in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

OTHERS: Final = "Measured"
"""Section of the pages that `nav` does not name."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that `nav` does not name into their section."""
    nav: list[dict[str, Any]] = list(config.nav or [])
    named = set(_pages(nav))
    docs = Path(config.docs_dir)
    left = sorted(page.name for page in docs.glob("*.md") if page.name not in named)
    for section in nav:
        if OTHERS in section:
            section[OTHERS] = left
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace each notebook by a page; the file itself stays for downloading."""
    for file in list(files):
        if file.src_path.endswith(".ipynb"):
            text = notebook_page(json.loads(Path(str(file.abs_src_path)).read_text("utf-8")))
            page = File.generated(config, f"{file.src_path[:-6]}.md", content=text)
            files.append(page)
    return files


def notebook_page(notebook: dict[str, Any]) -> str:
    """Write a notebook as Markdown, figures inside."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif text:
            parts.append(f"```python\n{text}\n```")
            parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        code = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="figure" src="data:image/png;base64,{code}">'
    if "text/html" in data:
        return "".join(line for line in "".join(data["text/html"]).splitlines() if line.strip())
    text = "".join(data.get("text/plain", output.get("text", "")))
    return f"```text\n{text.rstrip()}\n```" if text else ""


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for value in values for page in _pages(value)]
