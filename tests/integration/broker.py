"""A real mosquitto for tests: on loopback, with persistence, to be stopped, killed and started again."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = (
    ROOT / ".tools/usr/sbin/mosquitto",  # where `make` unpacks Debian's package without root
    Path("/usr/sbin/mosquitto"),
    Path("/usr/local/sbin/mosquitto"),
)


def executable() -> str | None:
    """Where mosquitto is, if it is."""
    return shutil.which("mosquitto") or next((str(p) for p in PLACES if p.is_file()), None)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Mosquitto:
    """One broker with its own folder and port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # started by root, mosquitto drops to a user of its own
        for parent in folder.parents:
            if parent.owner() == folder.owner() and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o011)
            else:
                break
        self.config = folder / "mosquitto.conf"
        self.config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nper_listener_settings false\n"
            f"persistence true\npersistence_location {folder}/\nautosave_interval 1\n"
            "max_queued_messages 100000\nmax_inflight_messages 100\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it takes connections."""
        program = executable()
        assert program is not None
        libraries = ROOT / ".tools/usr/lib/x86_64-linux-gnu"
        env = {"LD_LIBRARY_PATH": str(libraries)} if libraries.is_dir() else None
        log = (self.folder / "mosquitto.log").open("ab")
        self.process = subprocess.Popen([program, "-c", str(self.config)], stdout=log, stderr=log, env=env)
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError((self.folder / "mosquitto.log").read_text())

    def stop(self) -> None:
        """End it as an operator would: it writes its store."""
        self._end("terminate")

    def kill(self) -> None:
        """End it as a power failure would."""
        self._end("kill")

    def _end(self, how: str) -> None:
        if self.process is not None:
            getattr(self.process, how)()
            self.process.wait(10)
            self.process = None
