"""Hooks of mkdocs.yml: RESULTS.md becomes a page of the site, and links to files outside of docs/ become plain text."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)?(?:outputs|configs|metacv|scripts|tests)/[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "results.md", content=(ROOT / "RESULTS.md").read_text()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return OUTSIDE.sub(r"\1", markdown.replace("(../RESULTS.md", "(results.md"))
