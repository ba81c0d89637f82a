"""How far an evaluation is: a bar on a terminal, and a line now and then in a pipe or a file."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from metacv.terminal import progress_bar, say
from metacv.text import duration, printable

LINE_EVERY = 30  # seconds


def header(texts: Sequence[Mapping[str, str]]) -> str:
    """What is done, on what, for the terminal; where several things are done, with a line for each that differs."""
    lines = {name: list(dict.fromkeys(own[name] for own in texts)) for name in texts[0]}
    named = [("" if i else name, text) for name, own in lines.items() for i, text in enumerate(own)]
    return "\n".join(printable(f"{name:<9} {text}") for name, text in named)


@dataclass(frozen=True)
class Progress:
    """What is shown while something runs. `check` is called now and then, and may raise."""

    label: str = "evaluating"
    check: Callable[[], None] = lambda: None
    lines: bool = False  # where there is no terminal

    @contextmanager
    def of(self, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A function to call with the number of units that are done since the last call."""
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
