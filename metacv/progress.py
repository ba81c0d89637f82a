"""Progress of an evaluation: a bar on a terminal, or a line every 30 seconds in a pipe or a file."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from metacv.terminal import progress_bar, say
from metacv.text import duration, printable

LINE_EVERY = 30  # seconds


def header(texts: Sequence[Mapping[str, str]]) -> str:
    """Format the facts of one or more evaluations as aligned lines; a fact that differs between them has several."""
    lines = {name: list(dict.fromkeys(own[name] for own in texts)) for name in texts[0]}
    named = [("" if i else name, text) for name, own in lines.items() for i, text in enumerate(own)]
    return "\n".join(printable(f"{name:<9} {text}") for name, text in named)


@dataclass(frozen=True)
class Progress:
    """How to show progress. `check` is called after every batch and may raise to interrupt."""

    label: str = "evaluating"
    check: Callable[[], None] = lambda: None
    lines: bool = False  # print lines where there is no terminal

    @contextmanager
    def track(self, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Yield a function to call with the number of units completed since its last call."""
        label, start = printable(self.label), time.perf_counter()
        done, last = 0, start

        def update(count: int) -> None:
            nonlocal done, last
            self.check()
            bar.update(count)
            done, now = done + count, time.perf_counter()
            if self.lines and bar.disable and done < total and now - last >= LINE_EVERY:
                last, left = now, duration((now - start) * (total - done) / done)
                say(f"{label}: {done:,} of {total:,} {unit}s, about {left} left")

        with progress_bar(total, unit, label) as bar:
            yield update
