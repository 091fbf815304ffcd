"""A real mosquitto for tests: on loopback, with persistence, to be stopped, killed and started again."""

import hashlib
import shutil
import signal
import socket
import subprocess
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "mosquitto.conf"
SHIPPED_ACL = ROOT / "deploy" / "mosquitto.acl"
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


def password_line(user: str, password: str) -> str:
    """What `mosquitto_passwd` writes of a user: PBKDF2-SHA512 with 101 rounds."""
    salt = hashlib.sha256(user.encode()).digest()[:12]
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101)
    return f"{user}:$7$101${b64encode(salt).decode()}${b64encode(key).decode()}\n"


class Mosquitto:
    """One broker with its own folder and port, on the configuration that is shipped.

    `without` names settings that are left at mosquitto's default. With an access list, only its users are let
    in; each one's password is the name.
    """

    def __init__(self, folder: Path, *, without: Sequence[str] = (), acl: str | None = None) -> None:
        self.port = free_port()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # started by root, mosquitto drops to a user of its own
        for parent in folder.parents:
            if parent.owner() == folder.owner() and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o011)
            else:
                break
        lines = [line for line in SHIPPED.read_text().splitlines() if line.split(" ")[0] not in without]
        text = "\n".join(lines) + "\n"
        for here, there in (
            ("listener 1883 ", f"listener {self.port} "),
            ("persistence_location /var/lib/mosquitto/", f"persistence_location {folder}/"),
            *((("allow_anonymous true", "allow_anonymous false"),) if acl is not None else ()),
        ):
            assert text.count(here) == 1, here
            text = text.replace(here, there)
        self.acl = folder / "acl"
        if acl is not None:
            users = [line.split()[1] for line in acl.splitlines() if line.startswith("user ")]
            self._give(folder / "passwords", "".join(password_line(user, user) for user in users))
            self._give(self.acl, acl)
            text += f"password_file {folder}/passwords\nacl_file {self.acl}\n"
        self.config = folder / "mosquitto.conf"
        self._give(self.config, text)
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def _give(path: Path, text: str) -> None:
        """Write a file that mosquitto's own user may read."""
        path.write_text(text)
        path.chmod(0o644)

    def allow(self, acl: str) -> None:
        """Replace the access list while the broker runs."""
        self._give(self.acl, acl)
        self._signal(signal.SIGHUP)

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

    def freeze(self) -> None:
        """Let it do nothing until `thaw` or `kill`; what it wrote is still delivered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def undelivered(self) -> int:
        """Bytes that it wrote and that are not yet with the machine of who is to read them."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        own = [row for row in rows if row[1].endswith(f":{self.port:04X}") and row[3] == "01"]
        return sum(int(row[4].split(":")[0], 16) for row in own)

    def _signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def _end(self, how: str) -> None:
        if self.process is not None:
            getattr(self.process, how)()
            self.process.wait(10)
            self.process = None
