"""The commands that README and the pages in docs/ show."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[Path]:
    """README and every page."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def bash_blocks(page: Path) -> list[str]:
    """What stands in the page's blocks of shell commands."""
    return re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """All commands of a page, without comments, continued lines joined."""
    text = "\n".join(bash_blocks(page)).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]
