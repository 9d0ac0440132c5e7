"""Keeps the measurements and shows them: tables of medians and paired ratios, raw JSON, and a plot."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.client import Timing
from service.host.processor import processor

PRODUCT = "REST through Envoy"
GRPC = "gRPC direct"
ENGINE = "bare engine"
OURS = (PRODUCT, GRPC, ENGINE)
MACHINE = "the machine"
PLOT_COLUMNS = 4

# A table: the name of the load and of the figure. A row of it: the size (see Outcome) and the peer.
Table = tuple[str, str]
Row = tuple[float | None, str]


@dataclass(frozen=True)
class Figure:
    """One number. `better` says which direction is better: "more", "less", or "" for a number that only explains."""

    name: str
    value: float
    unit: str
    better: str


@dataclass(frozen=True)
class Outcome:
    """The result of a load: its figures, and the requests behind them.

    `size` is what a curve is drawn against, such as the requests at once; None where the load has only one size.
    """

    figures: list[Figure]
    timings: list[Timing] = field(default_factory=list)
    size: float | None = None


class Results:
    """Figures by load, size, peer and round. `folder` is created when there is something to save."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self._path = folder / time.strftime("%Y%m%d-%H%M%S.json", time.gmtime())
        self._about = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": f"{os.cpu_count()} cores, {processor()}",
            "options": dict(options),
        }
        self._measured: list[dict[str, Any]] = []
        self._tables: dict[Table, dict[Row, dict[int, Figure]]] = {}

    def add(self, number: int, peer: str, load: str, outcome: Outcome) -> None:
        """Adds the result of a load in round `number`."""
        self._measured.append(
            {
                "round": number,
                "peer": peer,
                "load": load,
                "size": outcome.size,
                "figures": [asdict(figure) for figure in outcome.figures],
                # Pieces came at these seconds after the request began.
                "requests": [
                    {"tokens": t.tokens, "cached": t.cached, "pieces": [round(at - t.began, 4) for at in t.at]}
                    for t in outcome.timings
                ],
            }
        )
        for figure in outcome.figures:
            rows = self._tables.setdefault((load, figure.name), {})
            rows.setdefault((outcome.size, peer), {})[number] = figure

    def values(self, table: Table, row: Row) -> dict[int, float]:
        """A figure's value by round; empty when it was not measured."""
        by_round = self._tables.get(table, {}).get(row, {})
        return {number: figure.value for number, figure in by_round.items()}

    def tables(self, load: str) -> list[Table]:
        """The tables of a load, in the order of its figures."""
        return [table for table in self._tables if table[0] == load]

    def ratios(self, table: Table, row: Row, other: Row) -> list[float]:
        """How many times as good `row` is as `other`, in each round that has both."""
        rows = self._tables[table]
        pairs = [(figure, rows[other][number]) for number, figure in rows.get(row, {}).items() if number in rows[other]]
        return [_ratio(a, b) if a.better == "more" else _ratio(b, a) for a, b in pairs]

    def save(self) -> Path:
        """Writes the raw measurements so far."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({**self._about, "measured": self._measured}, default=str) + "\n")
        return self._path

    def finish(self) -> None:
        """Prints the tables, saves the measurements and draws the plot."""
        print(f"{self._about['machine']}; began {self._about['began']}")
        for table, rows in self._tables.items():
            print(f"\n{': '.join(table)} [{_any_figure(rows).unit}]")
            for (size, peer), by_round in sorted(rows.items(), key=lambda row: row[0][0] or 0):
                values = [figure.value for figure in by_round.values()]
                label = peer if size is None else f"{size:g}: {peer}"
                line = f"  {label:32} {median(values):10.4g}  {min(values):.4g}..{max(values):.4g}"
                if _any_figure(rows).better and peer != PRODUCT:
                    ratios = self.ratios(table, (size, PRODUCT), (size, peer))
                    line = f"{line:66}{'ours is ' + times_as_good(ratios) if ratios else ''}"
                print(line.rstrip())
        print(f"\nraw measurements: {self.save()}")
        self._plot()

    def _plot(self) -> None:
        """A panel for each figure that depends on a size: the median for each peer, with every round as a point."""
        curves = {
            table: rows
            for table, rows in self._tables.items()
            if _any_figure(rows).better and all(size is not None for size, _ in rows)
        }
        if not curves:
            return
        from matplotlib.figure import Figure as Drawing  # noqa: PLC0415 - slow to import, and only needed at the end

        lines_of_panels = -(-len(curves) // PLOT_COLUMNS)
        drawing = Drawing(figsize=(5 * PLOT_COLUMNS, 4 * lines_of_panels), layout="tight")
        panels = drawing.subplots(lines_of_panels, PLOT_COLUMNS, squeeze=False)
        for panel, (table, rows) in zip(panels.flat, curves.items(), strict=False):
            for peer in {peer: None for _, peer in rows}:
                by_size = {
                    size: [figure.value for figure in by_round.values()]
                    for (size, name), by_round in rows.items()
                    if name == peer
                }
                (line,) = panel.plot(list(by_size), [median(values) for values in by_size.values()], label=peer)
                points = [(size, value) for size, values in by_size.items() for value in values]
                panel.scatter(*zip(*points, strict=True), s=12, color=line.get_color())
            panel.set_xscale("log", base=2)
            panel.set(xlabel=table[0], ylabel=f"{table[1]} [{_any_figure(rows).unit}]", ylim=(0, None))
            panel.legend()
        drawing.suptitle(str(self._about["machine"]), fontsize=9)
        drawing.savefig(self._path.with_suffix(".png"), dpi=120)
        print(f"plot: {self._path.with_suffix('.png')}")


def times_as_good(ratios: list[float]) -> str:
    """The rounds' ratios in words: their median and range."""
    return f"{median(ratios):.2f} times as good ({min(ratios):.2f}..{max(ratios):.2f})"


def _any_figure(rows: Mapping[Row, Mapping[int, Figure]]) -> Figure:
    """Unit and direction are the same for all figures of a table."""
    return next(figure for by_round in rows.values() for figure in by_round.values())


def _ratio(above: Figure, below: Figure) -> float:
    return above.value / below.value if below.value else float("inf")
