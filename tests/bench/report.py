"""What a run of the benchmark says: rows with raw numbers, tables for people, and the machine they are of."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.integration.broker import executable


@dataclass(frozen=True)
class Target:
    """What a figure ought to be at least (or at most), and what we would like it to be."""

    key: str
    goal: float
    aim: float | None = None
    most: bool = False

    def __str__(self) -> str:
        sign = "≤" if self.most else "≥"
        return f"{sign} {_short(self.goal)}" + (f", aim {_short(self.aim)}" if self.aim is not None else "")

    def verdict(self, value: float) -> str:
        """`aim`, `yes` or `no`."""

        def reached(bound: float) -> bool:
            return value <= bound if self.most else value >= bound

        if self.aim is not None and reached(self.aim):
            return "aim"
        return "yes" if reached(self.goal) else "no"


@dataclass(frozen=True)
class Row:
    """One measurement: raw numbers, and how it stands to the reference row of the same section and run."""

    what: str
    raw: Mapping[str, Any]
    ratio: float | None = None
    reference: str | None = None
    target: Target | None = None

    def verdict(self) -> str | None:
        """Whether the target was reached; None without one."""
        return None if self.target is None else self.target.verdict(self.raw[self.target.key])

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        found: dict[str, Any] = {"what": self.what, **self.raw}
        if self.ratio is not None:
            found |= {"ratio": self.ratio, "reference": self.reference}
        if self.target is not None:
            found |= {"target": str(self.target), "reached": self.verdict()}
        return found


@dataclass
class Section:
    """The rows of one section, and which of their numbers its table shows: key -> (header, format)."""

    name: str
    title: str
    columns: Mapping[str, tuple[str, str]]
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"seconds": self.seconds, "rows": [row.plain() for row in self.rows]}

    def table(self) -> Table:
        """For people."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("what", no_wrap=True)
        for header, _ in self.columns.values():
            table.add_column(header, justify="right")
        judged = any(row.target for row in self.rows)
        compared = any(row.ratio is not None for row in self.rows)
        for header, shown in (("ratio", compared), ("target", judged), ("reached", judged)):
            if shown:
                table.add_column(header, justify="right")
        for row in self.rows:
            cells = [row.what]
            for key, (_, form) in self.columns.items():
                cells.append(format(row.raw[key], form) if key in row.raw else "")
            if compared:
                cells.append("" if row.ratio is None else f"{row.ratio:.3g}")
            if judged:
                cells += ["" if row.target is None else str(row.target), row.verdict() or ""]
            table.add_row(*cells)
        return table


def host() -> dict[str, Any]:
    """When and where the figures were taken."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cores": os.cpu_count(),
        "cpu": _processor(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    program = executable()
    assert program is not None
    said = subprocess.run([program, "-h"], capture_output=True, text=True).stdout
    return {
        **host(),
        "mosquitto": said.split("\n")[0].removeprefix("mosquitto version "),
        **{name: version(name) for name in ("torch", "numpy", "msgspec", "aiomqtt", "paho-mqtt")},
    }


def sentence(facts: Mapping[str, Any]) -> str:
    """The machine in one line, and the versions that are known of it."""
    versions = [f"{name} {facts[name]}" for name in ("torch", "mosquitto") if name in facts]
    return ", ".join(
        [
            f"{facts['date'][:10]}, {facts['cores']} cores {facts['cpu']}, load {facts['load']:.1f} before",
            f"Python {facts['python']}",
            *versions,
        ]
    )


def quantiles(values: Sequence[float], prefix: str = "") -> dict[str, float]:
    """The median, the 95 % quantile and the greatest of some seconds, in milliseconds."""
    ordered = sorted(values)
    middle, high = (ordered[min(len(ordered) - 1, int(p * len(ordered)))] for p in (0.5, 0.95))
    return {
        f"{prefix}p50_ms": 1e3 * middle,
        f"{prefix}p95_ms": 1e3 * high,
        f"{prefix}max_ms": 1e3 * ordered[-1],
    }


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
