"""`metacv report`: a table and a page about all runs below some folders. Nothing on the page is outside of it."""

from itertools import groupby
from pathlib import Path

from jinja2 import StrictUndefined, Template

from metacv import __version__
from metacv.config import ReportConfig
from metacv.errors import UserError
from metacv.files import user_path, write_bytes_atomically
from metacv.report.figures import CURVES, HUES, by_cost, by_task, curves, sample_episodes
from metacv.report.gather import gather
from metacv.report.table import BEST, NOTE, Row, as_markdown, rows_of, varied_settings
from metacv.text import aligned, csv_bytes


def report(config: ReportConfig, folder: Path) -> list[dict[str, str]]:
    """Write report.html, .md and .csv into `folder`, and return the table's cells by column; UserError if no run."""
    places = [place for name in config.runs if not (place := user_path(name)).is_file()]
    if missing := [place for place in places if not place.is_dir()]:
        raise UserError(f"{missing[0]}: there is no such folder")
    runs, notes = gather(places)
    if not runs:
        raise UserError("; ".join([f"{', '.join(config.runs) or 'runs=[]'}: there is no run with a best.pt", *notes]))
    rows = rows_of(runs)
    varied = varied_settings(rows)
    all_cells = [row.cells(varied) for row in rows]
    columns = [name for name in all_cells[0] if any(own[name] for own in all_cells)]  # without empty ones
    cells = [{name: own[name] for name in columns} for own in all_cells]
    lines = [columns, *(list(own.values()) for own in cells)]
    notes = [NOTE] * any(row.selection for row in rows) + notes
    folder.mkdir(parents=True, exist_ok=True)
    html = page(rows, varied, cells, notes)
    for kind, text in (("csv", csv_bytes(lines)), ("md", as_markdown(lines).encode()), ("html", html.encode())):
        write_bytes_atomically(folder / f"report.{kind}", text)
    print("\n".join([aligned(lines), *notes]))
    for kind in ("html", "md", "csv"):
        print(f"{'written:' if kind == 'html' else '':<8} {folder / f'report.{kind}'}")
    return cells


def page(rows: list[Row], varied: list[str], cells: list[dict[str, str]], notes: list[str]) -> str:
    """The page. `rows` are in the order of the table: those of a task together."""
    best_first = sorted(rows, key=lambda row: -row.measured[0])
    runs = list({id(row.run): row.run for row in best_first}.values())
    groups = [list(group) for _, group in groupby(zip(rows, cells, strict=True), key=lambda pair: pair[0].task)]
    headings = [group[0][0].heading for group in groups]
    tasks = []
    for heading, group in zip(headings, groups, strict=True):
        test = group[0][0].test
        episodes = f", episode list {test.episodes_sha256[:8]}" if test and headings.count(heading) > 1 else ""
        tasks.append((heading + episodes, group))
    text = (Path(__file__).parent / "page.html.j2").read_text()
    template = Template(text, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.render(
        version=__version__,
        notes=notes,
        tasks=tasks,
        best=BEST,
        columns=[name for name in cells[0] if name not in ("task", "tested on")],
        hues=HUES,
        runs=runs,
        curves=curves(runs[:CURVES]),
        curve_names=[run.name for run in runs[:CURVES]],
        charts=by_task(best_first, varied),
        costs=by_cost(best_first),
        episodes=sample_episodes(runs),
    )
