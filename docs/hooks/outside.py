"""A hook of mkdocs: files outside docs/ that a page links to are part of the site, under repository/.

A link such as ``../benchmarks/README.md`` leads to the file in the viewer of a repository, and to a page in the site.
Markdown becomes a page, code becomes a page that shows it, and other files (pictures, JSON) are copied.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_FOLDER = "repository"  # of the site
_ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")  # the navigation names them
_CODE = {".py": "python", ".cff": "yaml"}
_FENCED = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)((?:#[^)\s]*)?(?=\)))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that a page links to, and those that these link to."""
    root, docs = Path(config.docs_dir).parent, Path(config.docs_dir).name
    found = set(_ALWAYS)
    for page in files.documentation_pages():
        found |= set(_targets(f"{docs}/{page.src_uri}", page.content_string))
    waiting, seen = sorted(found), set(found)
    while waiting:
        path = waiting.pop()
        if path.startswith(f"{docs}/") or not (root / path).is_file():
            continue  # a link that leads nowhere: mkdocs reports it
        files.append(_file(root, path, config))
        if path.endswith(".md"):
            found = set(_targets(path, (root / path).read_text(encoding="utf-8"))) - seen
            waiting, seen = waiting + sorted(found), seen | found
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links from or to a file outside docs/."""
    docs, place = Path(config.docs_dir).name, page.file.src_uri
    path = f"{docs}/{place}"
    if place.startswith(f"{_FOLDER}/"):
        path = place.removeprefix(f"{_FOLDER}/")
        page.meta.setdefault("search", {"boost": 0.3})  # behind the pages that are written for users

    def rewritten(link: str) -> str:
        target = _join(path, link)
        return posixpath.relpath(_place(target, docs), posixpath.dirname(place) or ".")

    return _with_links(markdown, rewritten)


def _file(root: Path, path: str, config: MkDocsConfig) -> File:
    place, suffix = _place(path), Path(path).suffix
    if suffix in _CODE:
        page = f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n````{_CODE[suffix]}\n"
        return File.generated(
            config, place, content=f"{page}{(root / path).read_text(encoding='utf-8')}````\n", inclusion=_HIDDEN
        )
    return File.generated(config, place, abs_src_path=str(root / path), inclusion=_HIDDEN)


_HIDDEN = InclusionLevel.NOT_IN_NAV  # a page that the navigation does not name is no fault


def _place(path: str, docs: str = "docs") -> str:
    """Return the path in the site of a file of the repository."""
    if path.startswith(f"{docs}/"):
        return path.removeprefix(f"{docs}/")
    return f"{_FOLDER}/{path}" + (".md" if Path(path).suffix in _CODE else "")


def _targets(path: str, markdown: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to."""
    for text in _FENCED.split(markdown)[::2]:
        for link in _LINK.finditer(text):
            yield _join(path, link[1])


def _join(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _with_links(markdown: str, rewritten: Callable[[str], str]) -> str:
    """Return a text whose links, outside of blocks of code, are rewritten."""
    pieces = _FENCED.split(markdown)
    pieces[::2] = [_LINK.sub(lambda link: rewritten(link[1]) + link[2], text) for text in pieces[::2]]
    return "".join(pieces)
