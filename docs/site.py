"""Hooks of mkdocs: files of the repository beside docs/ become pages, and nothing comes from elsewhere.

The files stay where they are, with links that work wherever the repository is read; here these links are turned
into the site's. README.md is the first page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
HOME = "index.md"
LINK = re.compile(
    r"(?P<before>\]\(|(?:src|href)=\")(?P<target>[^)\s\"#:]+)(?P<anchor>#[^)\s\"]*)?(?P<after>[)\"])"
)
LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//|<link[^>]*\shref=[\"']?(?:https?:)?//"
)
CANONICAL = re.compile(r"<link[^>]*rel=[\"']?canonical[^>]*>")


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and what any page links to."""
    files.append(_file(config, "README.md"))
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        file = waiting.pop()
        for found in LINK.finditer(file.content_string):
            path = _meant(file.src_uri, found["target"])
            if (ROOT / path).is_file() and files.get_file_from_path(_place(path)) is None:
                files.append(_file(config, path))
                if path.endswith(".md"):
                    waiting.append(files.get_file_from_path(_place(path)))  # type: ignore[arg-type]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""

    def turned(found: re.Match[str]) -> str:
        path = _meant(page.file.src_uri, found["target"])
        if not (ROOT / path).exists():
            return found[0]  # a mistake, which mkdocs then tells
        target = posixpath.relpath(_place(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{found['before']}{target}{found['anchor'] or ''}{found['after']}"

    return LINK.sub(turned, markdown)


def on_post_build(config: Any) -> None:
    """Raises PluginError where a page would load something from another host."""
    for page in Path(config.site_dir).rglob("*.html"):
        if found := LOADED.search(CANONICAL.sub("", page.read_text())):
            raise PluginError(f"{page.name} loads something from elsewhere: {found[0]}")


def _file(config: Any, path: str) -> File:
    """A file of the repository as one of the site's."""
    return File.generated(config, _place(path), abs_src_path=str(ROOT / path))


def _place(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path == "README.md":
        return HOME
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def _meant(src_uri: str, target: str) -> str:
    """The file of the repository that a page links to."""
    if src_uri == HOME:
        here = "README.md"
    else:
        here = src_uri.removeprefix("repository/") if src_uri.startswith("repository/") else f"docs/{src_uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
