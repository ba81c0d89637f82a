"""`metacv report`: a table and a page about all runs below some folders. Nothing on the page is outside of it."""

from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from metacv import __version__
from metacv.config import ReportConfig
from metacv.errors import UserError
from metacv.files import user_path, write_bytes_atomically
from metacv.report.figures import CURVES, HUES, by_task, curves, sample_episodes
from metacv.report.gather import gather
from metacv.report.table import BEST, NOTE, Cells, Row, as_csv, as_markdown, as_text, cells_of, rows_of, varied_settings

__all__ = ["report"]


def report(config: ReportConfig, folder: Path) -> list[dict[str, str]]:
    """Write report.html, report.md and report.csv into `folder`, and return the cells of the table by column.

    Raises UserError if one of the folders does not exist, or if there is no run below them.
    """
    places = [place for name in config.runs if not (place := user_path(name)).is_file()]
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: there is no such folder")
    runs, notes = gather(places)
    if not runs:
        raise UserError("; ".join([f"{', '.join(config.runs)}: there is no run with a best.pt", *notes]))
    rows = rows_of(runs)
    varied = varied_settings(rows)
    cells = cells_of(rows, varied)
    notes = [NOTE] * any(row.selection for row in rows) + notes
    folder.mkdir(parents=True, exist_ok=True)
    for kind, text in (("csv", as_csv(cells)), ("md", as_markdown(cells)), ("html", page(rows, varied, cells, notes))):
        write_bytes_atomically(folder / f"report.{kind}", text.encode())
    print("\n".join([as_text(cells), *notes]))
    for kind in ("html", "md", "csv"):
        print(f"{'written:' if kind == 'html' else '':<8} {folder / f'report.{kind}'}")
    return cells


def page(rows: list[Row], varied: list[str], cells: Cells, notes: list[str]) -> str:
    """The page. `rows` are in the order of the table: those of a task together."""
    best_first = sorted(rows, key=lambda row: -row.measured[0])
    runs = list({id(row.run): row.run for row in best_first}.values())
    groups = [list(group) for _, group in groupby(zip(rows, cells, strict=True), key=lambda pair: pair[0].task)]
    headings = [group[0][0].heading for group in groups]
    tests = [group[0][0].test for group in groups]
    headings = [
        f"{heading}, episode list {test.episodes_sha256[:8]}" if test and headings.count(heading) > 1 else heading
        for heading, test in zip(headings, tests, strict=True)
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        version=__version__,
        notes=notes,
        tasks=list(zip(headings, groups, strict=True)),
        best=BEST,
        columns=[name for name in cells[0] if name not in ("task", "tested on")],
        hues=HUES,
        runs=runs,
        curves=curves(runs[:CURVES]),
        curve_names=[run.name for run in runs[:CURVES]],
        charts=by_task(best_first, varied),
        episodes=sample_episodes(runs),
    )
