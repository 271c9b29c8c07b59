"""Show the notebooks of the documentation as pages: a hook of mkdocs.

In `mkdocs.yml`, `hooks: [docs/hooks/notebooks.py]` makes a page `notebooks/NAME.md` of each `notebooks/NAME.ipynb`. The
page has the text, the code and the outputs that are stored in the notebook, and a link to it. Nothing is executed. The
pictures become files beside the page. Code with the tag "hide-input", such as that of a picture, is left out.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page and its pictures for each notebook."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(file.src_uri)
        page, pictures = to_page(json.loads(file.content_string), path.stem)
        files.append(File.generated(config, str(path.with_suffix(".md")), content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, str(path.with_name(name)), content=picture))
    return files


def to_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of a notebook, and its pictures by file name."""
    blocks: list[str] = []
    pictures: dict[str, bytes] = {}
    heading = ""  # describes a picture to those who cannot see it
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            heading = (re.findall(r"^#+ (.*)$", source, re.MULTILINE) or [heading])[-1]
            continue
        if "hide-input" not in cell["metadata"].get("tags", []):
            blocks.append(_fenced(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                picture = f"{name}_{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                blocks.append(f"![{heading}]({picture})")
            else:
                blocks.append(_fenced("".join(data["text/plain"]), "text"))
    blocks.append(f"This page is the notebook [{name}.ipynb]({name}.ipynb), without the code that draws the pictures.")
    return "\n\n".join(blocks) + "\n", pictures


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
