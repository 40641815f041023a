"""Tables of a page in docs/ that a benchmark writes, between two marks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

BEGIN: Final = "<!-- tables -->"
END: Final = "<!-- end of tables -->"


def split_page(path: Path) -> tuple[str, str]:
    """What stands before and behind the tables.

    Raises:
        ValueError: If the page has no such marks.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r}; add them where tables belong")
    return text.split(BEGIN)[0], text.split(END)[1]


def write_tables(path: Path, parts: Sequence[str]) -> None:
    """Replace what stands between the marks; errors as `split_page`."""
    head, tail = split_page(path)
    path.write_text("\n\n".join([head + BEGIN, *parts, END + tail]), encoding="utf-8")
