"""Chaos for real: broker, daemon, disk, clock and network break at once, and what was promised is counted."""
