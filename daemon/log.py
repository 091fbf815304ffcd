"""Log lines: for people on a terminal, one JSON object a line elsewhere."""

import logging
import sys

import structlog


def configure(level: str = "info") -> None:
    """Send log lines to standard error, from `level` up."""
    machine = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.dev.ConsoleRenderer()] if sys.stderr.isatty() else machine),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
