"""A hook of mkdocs: files outside docs/ that a page links to are part of the site, under repository/.

A link such as ``../benchmarks/README.md`` leads to the file in the viewer of a repository, and to a page in the site.
Markdown becomes a page, code becomes a page that shows it, and other files (pictures, JSON) are copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_FOLDER = "repository"  # of the site
_ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")  # the navigation names them
_CODE = {".py": "python", ".cff": "yaml"}
_HIDDEN = InclusionLevel.NOT_IN_NAV  # a page that the navigation does not name is no fault
_FENCED = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)((?:#[^)\s]*)?(?=\)))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that a page links to, and those that these link to."""
    root = Path(config.docs_dir).parent
    waiting, seen = list(_ALWAYS), set()
    for page in files.documentation_pages():
        waiting += _targets(f"docs/{page.src_uri}", page.content_string)
    while waiting:
        path = waiting.pop()
        if path in seen or path.startswith("docs/") or not (root / path).is_file():
            continue  # a link that leads nowhere: mkdocs reports it
        seen.add(path)
        files.append(_file(root, path, config))
        if path.endswith(".md"):
            waiting += _targets(path, (root / path).read_text(encoding="utf-8"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links from or to a file outside docs/."""
    place = page.file.src_uri
    path = f"docs/{place}"
    if place.startswith(f"{_FOLDER}/"):
        path = place.removeprefix(f"{_FOLDER}/")
        page.meta.setdefault("search", {"boost": 0.3})  # behind the pages that are written for users

    def rewritten(link: re.Match[str]) -> str:
        target = _place(_join(path, link[1]))
        return posixpath.relpath(target, posixpath.dirname(place) or ".") + link[2]

    pieces = _FENCED.split(markdown)
    pieces[::2] = [_LINK.sub(rewritten, text) for text in pieces[::2]]  # the others are blocks of code
    return "".join(pieces)


def _file(root: Path, path: str, config: MkDocsConfig) -> File:
    place, suffix = _place(path), Path(path).suffix
    if suffix in _CODE:
        page = f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n````{_CODE[suffix]}\n"
        return File.generated(
            config, place, content=f"{page}{(root / path).read_text(encoding='utf-8')}````\n", inclusion=_HIDDEN
        )
    return File.generated(config, place, abs_src_path=str(root / path), inclusion=_HIDDEN)


def _place(path: str) -> str:
    """Return the path in the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{_FOLDER}/{path}" + (".md" if Path(path).suffix in _CODE else "")


def _targets(path: str, markdown: str) -> list[str]:
    """Return the files of the repository that a page links to."""
    return [_join(path, link) for link, _ in _LINK.findall(_FENCED.sub("", markdown))]


def _join(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
