"""Text for terminals, tables and spreadsheets."""

import csv
import io
import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def printable(text: str) -> str:
    """Replace unprintable characters of untrusted text, such as a file name, by ?; the result is one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def short(line: str, word: int = 200, length: int = 1000) -> str:
    """Drop the middle of words longer than `word` characters, and of the line if it is longer than `length`."""
    line = re.sub(rf"\S{{{word + 1},}}", lambda match: f"{match[0][: word // 2]}...{match[0][-word // 4 :]}", line)
    return line if len(line) <= length else f"{line[: length // 2]} ... {line[-length // 4 :]}"


def shortened_in_the_middle(text: str, length: int) -> str:
    """Keep the beginning and the end of a text that is longer than `length` characters."""
    end = (length - 3) // 2
    return text if len(text) <= length else f"{text[: length - 3 - end]}...{text[len(text) - end :]}"


def without_middle(text: str, fits: Callable[[str], bool], mark: str) -> str:
    """Drop as few characters as needed from the middle, with `mark` in their place, until the text fits."""
    shown, kept = text, len(text)
    while not fits(shown):
        kept -= 1
        shown = f"{text[: kept // 2]}{mark}{text[len(text) - (kept - kept // 2) :]}"
    return shown


def csv_safe(text: str) -> str:
    """Prefix text that a spreadsheet would take for a formula with '; numbers stay numbers."""
    computed = re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]", text)
    return f"'{text}" if computed and not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", text, re.IGNORECASE) else text


def csv_bytes(lines: Iterable[Sequence[object]]) -> bytes:
    """Encode a table as CSV with safe, printable texts, in UTF-8 with a byte-order mark for Excel."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(
        [csv_safe(printable(cell)) if isinstance(cell, str) else cell for cell in line] for line in lines
    )
    return text.getvalue().encode("utf-8-sig")


def aligned(lines: list[list[str]]) -> str:
    """Format a table for the terminal with aligned columns."""
    widths = [max(map(columns, column)) for column in zip(*lines, strict=True)]
    cells = ([cell + " " * (width - columns(cell)) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def columns(text: str) -> int:
    """Return the width of a text in a terminal: Chinese letters take two columns, combining accents none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def plural(count: int, noun: str, nouns: str = "") -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def in_bytes(count: int) -> str:
    """`1.5 GB`, of 10**9 bytes."""
    return f"{count / 1e9:,.1f} GB"


def percent(accuracy: float, ci95: float) -> str:
    """Format an accuracy and its interval, both from 0 to 1, in %: `98.37 ± 0.48`."""
    return f"{100 * accuracy:.2f} ± {100 * ci95:.2f}"


def significant(value: float) -> str:
    """Format three significant digits without an exponent: `0.25`, `12.3` or `1,230`."""
    return f"{float(f'{value:.3g}'):,.10g}"


def duration(seconds: float) -> str:
    """`40 s`, `25 min` or `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most 300 letters, or the name of its class if the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def shortened(places: Sequence[str | Path]) -> list[str]:
    """Return the paths relative to the deepest folder that contains all of them."""
    whole = [os.path.abspath(place) for place in places]
    common = os.path.commonpath([os.path.dirname(place) for place in whole])
    return [os.path.relpath(place, common) for place in whole]


def setting(name: str, value: Path) -> str:
    """Format a path setting as `name=value`, quoted for a shell."""
    return shlex.quote(f"{name}={value}")
