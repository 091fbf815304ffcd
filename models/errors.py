"""The errors that end in one clear sentence for whoever runs the program."""


class BarcastError(Exception):
    """A fault that the user can mend. The message names the file or field, the value and the remedy."""


class DiskFullError(BarcastError):
    """No room where something must be written: it may go on when there is some, without anybody's doing."""


class JournalLostError(BarcastError, ConnectionError):
    """The journal's server is not there: it may go on when it is, without anybody's doing."""


class DeposedError(BarcastError):
    """Another instance has the lease of the journal: this one must start again, as a standby."""


class ConfigError(BarcastError):
    """A setting, a missing file or a combination that cannot work."""


class DataError(BarcastError):
    """Bars in a file that cannot be used."""


class CheckpointError(BarcastError):
    """A model directory that is damaged, foreign or newer than this program."""
