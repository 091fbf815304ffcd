"""The command line. It is the top layer: the one place that knows the live and the replay side."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from barcast.backtest.cli import (
    auditing,
    doctor,
    models,
    operators,
    quants,
    stressing,
    sweeps,
    training,
    watching,
)
from barcast.backtest.cli.terminal import app, err, out
from barcast.models import BarcastError, DeposedError, DiskFullError, JournalLostError

__all__ = [
    "app",
    "auditing",
    "doctor",
    "main",
    "models",
    "operators",
    "quants",
    "stressing",
    "sweeps",
    "training",
    "watching",
]

EX_CONFIG = 78
"""Exit status for a fault that a person must mend: systemd does not restart on it."""
EX_IOERR = 74
"""Exit status for a full disk, a lost journal or a lost lease: it is worth trying again."""


def _version(asked: bool) -> None:
    if asked:
        out.print(version("barcast"))
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Calibrated quantile forecasts of OHLCV bars: live over MQTT, and in backtests on the same path."""


def main() -> None:
    """Run a command; a fault that a person can mend ends in one sentence and exit status 78."""
    faults: list[BaseException] = []
    try:
        app()
    except* BarcastError as group:
        faults = _leaves(group)
    for fault in faults:
        err.print("error: ", style="bold red", end="")
        err.print(str(fault), highlight=False, markup=False, soft_wrap=True)
    if faults:
        again = all(isinstance(fault, DiskFullError | JournalLostError | DeposedError) for fault in faults)
        sys.exit(EX_IOERR if again else EX_CONFIG)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
