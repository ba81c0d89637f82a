"""`metacv report`: a table and a self-contained HTML page about all runs below some folders."""

import shutil
from itertools import chain
from pathlib import Path

from jinja2 import StrictUndefined, Template

from metacv import __version__
from metacv.config import ReportConfig
from metacv.errors import UserError
from metacv.files import user_path, write_bytes_atomically
from metacv.report.figures import CURVES, HUES, by_cost, by_task, curves, sample_episodes
from metacv.report.gather import gather
from metacv.report.table import (
    BEST,
    NOTE,
    Group,
    as_markdown,
    for_csv,
    for_terminal,
    groups_of,
    markdown_safe,
    modes_to_compare,
    shown_columns,
)
from metacv.text import aligned, csv_bytes


def report(config: ReportConfig, folder: Path) -> list[dict[str, str]]:
    """Write report.html, .md and .csv into `folder`; return the rows as cells by column. UserError if no run."""
    places = [place for name in config.runs if not (place := user_path(name)).is_file()]
    if missing := [place for place in places if not place.is_dir()]:
        raise UserError(f"{missing[0]}: there is no such folder")
    runs, notes = gather(places)
    if not runs:
        raise UserError("; ".join([f"{', '.join(config.runs) or 'runs=[]'}: there is no run with a best.pt", *notes]))
    groups, varied = groups_of(runs)
    all_cells = [[row.cells(varied) for row in group.rows] for group in groups]
    tables = []
    for own in all_cells:
        shown = shown_columns(own)
        tables.append([shown, *([cells[name] for name in shown] for cells in own)])
    rows = [*chain(*all_cells)]
    columns = [name for name in rows[0] if any(own[name] for own in rows)]  # without empty ones
    cells = [{name: own[name] for name in columns} for own in rows]
    notes = [*modes_to_compare(runs), *[NOTE] * any(row.selection for group in groups for row in group.rows), *notes]
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "html": page(groups, varied, tables, notes).encode(),
        "md": markdown(groups, tables, notes).encode(),
        "csv": csv_bytes(for_csv(cells)),
    }
    for kind, content in texts.items():
        write_bytes_atomically(folder / f"report.{kind}", content)
    width = shutil.get_terminal_size().columns
    for group, table in zip(groups, tables, strict=True):
        print("\n".join([group.heading, *group.sentences, aligned(for_terminal(table, width)), ""]))
    if notes:
        print("\n".join(notes))
    for kind in texts:
        print(f"{'written:' if kind == 'html' else '':<8} {folder / f'report.{kind}'}")
    return cells


def markdown(groups: list[Group], tables: list[list[list[str]]], notes: list[str]) -> str:
    """Render the report as GitHub Markdown: a heading, the selection and a table for each group."""
    parts = []
    for group, table in zip(groups, tables, strict=True):
        words = "\n\n".join(map(markdown_safe, group.sentences))
        parts.append(f"## {markdown_safe(group.heading)}\n\n{words}\n\n{as_markdown(table)}")
    return "\n".join([*parts, *(f"{markdown_safe(note)}\n" for note in notes)])


def page(groups: list[Group], varied: list[str], tables: list[list[list[str]]], notes: list[str]) -> str:
    """Render the HTML page; `tables` are those of the groups, each with a header row."""
    best_first = sorted((row for group in groups for row in group.rows), key=lambda row: -row.validated)
    runs = list({id(row.run): row.run for row in best_first}.values())
    text = (Path(__file__).parent / "page.html.j2").read_text("utf-8")
    template = Template(text, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.render(
        version=__version__,
        notes=notes,
        groups=list(zip(groups, tables, strict=True)),
        best=BEST,
        hues=HUES,
        runs=runs,
        curves=curves(runs[:CURVES]),
        curve_names=[run.name for run in runs[:CURVES]],
        charts=by_task(best_first, varied),
        costs=by_cost(best_first),
        episodes=sample_episodes(runs),
    )
