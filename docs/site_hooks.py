"""What the site needs beside its pages: README and the journal as pages, links out of docs/, and examples as code."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from os.path import relpath
from pathlib import Path
from typing import Final, Protocol

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PACKAGE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"\s*(```|~~~)")
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")

PAGES: Final[Mapping[str, str]] = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/journal.md": "journal.md",
}
"""Pages of the site that lie outside of docs/."""


def fenced(lines: list[str]) -> list[str]:
    """The lines with a fence around each example of the interpreter that has none."""
    out: list[str] = []
    inside = example = False
    for line in lines:
        if not example and FENCE.match(line):
            inside = not inside
        if not inside and not example and line.startswith(">>> "):
            example = True
            out.append("```python")
        elif example and not line.strip():
            example = False
            out.append("```")
        out.append(line)
    return [*out, "```"] if example else out


class Examples(Preprocessor):
    """`fenced`, for Markdown."""

    def run(self, lines: list[str]) -> list[str]:
        return fenced(lines)


class WithExamples(Extension):
    """Markdown that knows examples of the interpreter."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - its name there
        md.preprocessors.register(Examples(md), "examples", 28)  # before fences are read


class Config(Protocol):
    """What is used of the site's configuration."""

    markdown_extensions: list[object]


def on_config(config: Config) -> Config:
    """The configuration with that Markdown, for pages and docstrings."""
    config.markdown_extensions.append(WithExamples())
    return config


def page_of(path: str) -> str | None:
    """The page, relative to docs/, that shows a file of the repository; None where no page does."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("examples/") and path.endswith(".py"):
        return f"{path}.md"
    return PAGES.get(path)


def relinked(markdown: str, written: str, shown: str) -> str:
    """The text of the file `written`, as it reads on the page `shown`.

    A link to a file that has a page leads there. Any other one becomes its words and the file's path.
    """

    def link(found: re.Match[str]) -> str:
        picture, words, to, heading = found.groups()
        path = (ROOT / written).parent.joinpath(to).resolve()
        if ":" in to or not path.exists() or not path.is_relative_to(ROOT):
            return found[0]
        name = path.relative_to(ROOT).as_posix()
        page = page_of(name)
        if page is not None:
            return f"{picture}[{words}]({relpath(page, Path(shown).parent)}{heading or ''})"
        return f"`{name}`" if words.strip("`/").split("/")[-1] == path.name else f"{words} (`{name}`)"

    return LINK.sub(link, markdown)


def source(path: Path) -> str:
    """A page with the source of an example."""
    name = path.relative_to(ROOT).as_posix()
    return f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n````python\n{path.read_text()}````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's files, and those that are made: README, the journal and the examples."""
    made = {page: relinked((ROOT / name).read_text(), name, page) for name, page in PAGES.items()}
    examples = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("examples/gallery/*.py")])
    made |= {f"{path.relative_to(ROOT).as_posix()}.md": source(path) for path in examples}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def exported(package: str) -> list[str]:
    """The names that a package exports, in its own order; none for a module."""
    path = ROOT.joinpath(*package.split("."), "__init__.py")
    if not path.exists():
        return []
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return [name.name for node in sorted(imports, key=lambda node: node.lineno) for name in node.names if name.asname]


def each_name(directive: re.Match[str]) -> str:
    """What a page says for a package: each of its names."""
    package = directive[1]
    names = [f"::: {package}.{name}\n    options:\n      heading_level: 3" for name in exported(package)]
    return "\n\n".join([f"::: {package}\n    options:\n      members: false" if names else directive[0], *names])


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """A page of docs/ whose links lead somewhere on the site, and which shows each name of a package."""
    name = page.file.src_uri
    return markdown if page.file.generated_by else relinked(PACKAGE.sub(each_name, markdown), f"docs/{name}", name)
