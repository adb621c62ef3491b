"""Lets pages link to files of the repository outside docs/, by relative links as in an editor.

mkdocs then gets the files that pages link to: Markdown, pictures and results as they are, and
source files as pages that show their text. So there is one copy of each.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+")
AS_IT_IS = {".md", ".png", ".json", ".txt"}
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cpp", ".cuh": "cpp"}
SOURCE = """---
search:
  exclude: true
---
# {path}

````{language}
{text}
````
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to."""
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            path = path_of(link, page)
            if path and not files.get_file_from_path(name_of(path)):
                files.append(file_of(path, page, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change links to files outside docs/ to links to what was added for them."""

    def replaced(match: re.Match[str]) -> str:
        path = path_of(match[0], page.file)
        start = posixpath.dirname(page.file.src_uri) or "."
        return posixpath.relpath(name_of(path), start) if path else match[0]

    return LINK.sub(replaced, markdown)


def path_of(link: str, page: File) -> str | None:
    """Return the path of a link's file in the repository; None for a file in docs/."""
    folder = posixpath.join("docs", posixpath.dirname(page.src_uri))
    path = posixpath.normpath(posixpath.join(folder, link))
    return None if path.startswith("docs/") else path


def name_of(path: str) -> str:
    """Return the name under which mkdocs gets a file of the repository."""
    return path if Path(path).suffix in AS_IT_IS else f"{path}.md"


def file_of(path: str, page: File, config: MkDocsConfig) -> File:
    """Return what mkdocs gets for a file of the repository."""
    source = ROOT / path
    if not source.is_file() or path == "README.md":
        rule = "must be a file of the repository, and not README.md, which is index.md here"
        raise PluginError(f"docs/{page.src_uri}: a link {rule}: got {path}")
    if name_of(path) == path:
        return File.generated(config, path, abs_src_path=str(source))
    language = LANGUAGES.get(source.suffix, "text")
    text = SOURCE.format(path=path, language=language, text=source.read_text().rstrip())
    return File.generated(config, name_of(path), content=text)
