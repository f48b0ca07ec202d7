"""The documentation's pages as text: their blocks, headings and links, as GitHub reads them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READ_ON_GITHUB = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
_FENCE = re.compile(r"^(```+)([^\n]*)\n(.*?)^\1\s*$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Fenced blocks in order: language and text."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [(language, text) for _, language, text in found if language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    return _LINK.findall(_CODE.sub("code", prose(page)))


def slug_of(heading: str) -> str:
    """A heading's anchor as GitHub makes it, before equal ones are numbered."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        slug = slug_of(heading)
        taken, number = slug, 0
        while taken in found:
            number += 1
            taken = f"{slug}-{number}"
        found.add(taken)
    return found


def toctrees() -> dict[Path, list[Path]]:
    """The pages that each page's tables of contents name."""
    found: dict[Path, list[Path]] = {}
    for page in PAGES:
        for _, text in blocks(page, "{toctree}"):
            lines = [line.strip() for line in text.splitlines()]
            entries = [line for line in lines if line and not line.startswith(":")]
            found.setdefault(page, []).extend(
                (page.parent / f"{entry}.md").resolve() for entry in entries
            )
    return found
