"""Keeps what was measured, and shows it: tables of medians and paired ratios, raw JSON, and a plot."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.loads import Figure, Outcome, Timing

PRODUCT = "REST through Envoy"
GRPC = "gRPC direct"
ENGINE = "bare engine"
OURS = (PRODUCT, GRPC, ENGINE)
MACHINE = "the machine"
VECTOR_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


class Results:
    """Figures by round, peer and load. `folder` is created when there is something to save."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self._folder = folder
        self._about = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
            "options": {name: value for name, value in options.items() if name != "run"},
        }
        self._name = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self._measured: list[dict[str, Any]] = []
        self._figures: dict[tuple[str, str], dict[int, Figure]] = {}

    def add(self, number: int, peer: str, load: str, outcome: Outcome) -> None:
        """Takes in what a load gave in round `number`."""
        self._measured.append(
            {
                "round": number,
                "peer": peer,
                "load": load,
                "figures": [asdict(figure) for figure in outcome.figures],
                "requests": [_raw(timing) for timing in outcome.timings],
            }
        )
        for figure in outcome.figures:
            self._figures.setdefault((figure.name, peer), {})[number] = figure

    def values(self, name: str, peer: str) -> dict[int, float]:
        """A figure's value by round; empty when it was not measured."""
        return {number: figure.value for number, figure in self._figures.get((name, peer), {}).items()}

    def peers(self, name: str) -> list[str]:
        """Who has this figure, in the order of measuring."""
        return [peer for measured, peer in self._figures if measured == name]

    def save(self) -> Path:
        """Writes the raw measurements so far."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._name}.json"
        path.write_text(json.dumps({**self._about, "measured": self._measured}, default=str) + "\n")
        return path

    def finish(self) -> None:
        """Prints the tables, saves the measurements and draws the plot."""
        print(f"{self._about['machine']}; began {self._about['began']}")
        for name in dict.fromkeys(name for name, _ in self._figures):
            self._print(name)
        print(f"\nraw measurements: {self.save()}")
        if plot := self._plot():
            print(f"plot: {plot}")

    def _print(self, name: str) -> None:
        figures = {peer: self._figures[name, peer] for peer in self.peers(name)}
        any_figure = next(iter(next(iter(figures.values())).values()))
        print(f"\n{name} [{any_figure.unit}]")
        for peer, by_round in figures.items():
            values = [figure.value for figure in by_round.values()]
            spread = f"{min(values):.4g}..{max(values):.4g}"
            line = f"  {peer:24} {statistics.median(values):10.4g}  {spread:18}"
            if any_figure.better and peer != PRODUCT and PRODUCT in figures:
                line += f"  {self._advantage(name, peer, any_figure.better)}"
            print(line.rstrip())

    def _advantage(self, name: str, peer: str, better: str) -> str:
        """How many times better the product is, in pairs of one round."""
        ours, theirs = self.values(name, PRODUCT), self.values(name, peer)
        pairs = [(ours[number], theirs[number]) for number in ours.keys() & theirs.keys()]
        ratios = [_ratio(a, b) if better == "more" else _ratio(b, a) for a, b in pairs]
        if not ratios:
            return ""
        return f"ours is {statistics.median(ratios):.2f} times as good ({min(ratios):.2f}..{max(ratios):.2f})"

    def _plot(self) -> Path | None:
        """Output rate by concurrency for each peer, with every round as a point."""
        rates: dict[str, dict[int, list[float]]] = {}
        for (name, peer), by_round in self._figures.items():
            label, _, rest = name.partition(" ")
            if rest == "output rate" and label.startswith("c") and label[1:].isdecimal():
                rates.setdefault(peer, {})[int(label[1:])] = [figure.value for figure in by_round.values()]
        if not rates:
            return None
        pyplot = headless_pyplot()
        figure, axes = pyplot.subplots(figsize=(9, 5.5))
        for peer, by_concurrency in rates.items():
            (line,) = axes.plot(
                list(by_concurrency), [statistics.median(values) for values in by_concurrency.values()], label=peer
            )
            points = [(concurrency, value) for concurrency, values in by_concurrency.items() for value in values]
            axes.scatter(*zip(*points, strict=True), s=12, color=line.get_color())
        axes.set(xlabel="requests at once", ylabel="output tokens/s", xlim=(0, None), ylim=(0, None))
        axes.set_title(f"Closed loop, {self._about['machine']}", fontsize=9)
        axes.legend()
        path = self._folder / f"{self._name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        return path


def headless_pyplot() -> Any:
    """Matplotlib's pyplot, for files and not for a screen."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and only needed at the end

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("inf")


def _raw(timing: Timing) -> dict[str, Any]:
    """A request's times in seconds after it began, to a tenth of a millisecond."""
    return {
        "tokens": timing.tokens,
        "cached": timing.cached,
        "pieces": [round(moment - timing.began, 4) for moment in timing.at],
    }


def machine() -> str:
    """The machine in a line, with the vector sets that decide which kernels run."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    sets = [name for name in VECTOR_SETS if name in fields.get("flags", fields.get("Features", "")).split()]
    name = fields.get("model name", "processor unknown")
    return f"{platform.machine()}, {os.cpu_count()} cores, {name} ({', '.join(sets)})"
