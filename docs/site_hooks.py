"""What the site needs beside its pages: examples of the interpreter as code, and no links to what lies outside."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Protocol

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
PACKAGE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"\s*(```|~~~)")


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


def on_page_markdown(markdown: str, **_: object) -> str:
    """A page whose links to code are just their words, and which shows each name of a package."""
    return PACKAGE.sub(each_name, OUTSIDE.sub(r"\1", markdown))
