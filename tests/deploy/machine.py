"""A machine to install on: a real systemd as the first process of namespaces of its own.

Its files are a throw-away layer over those of this machine, with a network, processes and control groups of
its own. Needs root on Linux. Memory and CPU limits are not enforced where the kernel's controllers are taken
by the older hierarchy of control groups.
"""

import json
import os
import site
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SYSTEMD = Path("/lib/systemd/systemd")
CGROUPS = Path("/sys/fs/cgroup")
FLAGS = ("--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts", "--cgroup")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# Without units that find hardware, or empty /tmp and with it what is mounted there.
MASKED = ("systemd-tmpfiles-setup.service", "systemd-udevd.service", "systemd-resolved.service")
ROOT = Path(__file__).parents[2]
SOURCE = "/opt/source"
# Interpreter and packages of this run, in the place of the system's and of those that pip would fetch.
PYTHON = f"/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = ("PYTHONPATH=/opt/packages", "LD_LIBRARY_PATH=/opt/python/lib")
NO_NETWORK = ("PIP_NO_INDEX=1", "PIP_NO_DEPS=1", "PIP_NO_BUILD_ISOLATION=0")
TARGET = """[Unit]
Requires=systemd-journald.service dbus.socket
After=systemd-journald.service dbus.socket
"""


def obstacle() -> str | None:
    """Why there can be no such machine here, if there cannot."""
    if os.geteuid() != 0:
        return "booting a systemd needs root"
    if not SYSTEMD.is_file():
        return f"booting a systemd needs {SYSTEMD}: apt-get install systemd"
    needed = (
        "mount --make-rprivate /",
        "mount -t tmpfs t /mnt",
        "mkdir /mnt/a /mnt/b /mnt/c",
        "mount -t cgroup2 g /mnt/a",
        "mount -t overlay -o lowerdir=/,upperdir=/mnt/b,workdir=/mnt/c o /mnt/a",
    )
    trial = subprocess.run(
        ["unshare", *FLAGS, "sh", "-c", " && ".join(needed)], capture_output=True, text=True
    )
    return f"no namespaces here: {trial.stderr.strip()}" if trial.returncode else None


class Machine:
    """A machine with this source tree in /opt/source, and in /opt/feed what `feed` holds here."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.feed = folder, folder / "feed"
        self.feed.mkdir()
        packages = next(path for path in map(Path, site.getsitepackages()) if (path / "pip").is_dir())
        self.binds = {ROOT: SOURCE, self.feed: "/opt/feed", packages: "/opt/packages"}
        self.binds[Path(sys.base_prefix)] = "/opt/python"
        self._outer: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Start systemd and wait until it takes orders."""
        group = CGROUPS / "unified" if (CGROUPS / "unified").is_dir() else CGROUPS
        self._group = group / f"barcast-test-{os.getpid()}"
        self._group.mkdir(exist_ok=True)
        (self.folder / "layer").mkdir(parents=True)
        pairs = [f"{here}:{there}" for here, there in self.binds.items()]
        self._log = self.folder / "boot.log"
        join = f'echo $$ > {self._group}/cgroup.procs && exec "$@"'
        inner = (sys.executable, __file__, str(self.folder / "layer"), *pairs)
        with self._log.open("wb") as log:
            self._outer = subprocess.Popen(
                ["bash", "-c", join, "bash", "unshare", *FLAGS, *inner], stdout=log, stderr=log
            )
        for _ in range(300):
            if (
                self._first()
                and self.run("systemctl", "is-active", "machine.target", check=False).returncode == 0
            ):
                return
            if self._outer.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"systemd did not start: {self._log.read_text()}")

    def _first(self) -> str | None:
        """Its first process, as it is numbered here."""
        assert self._outer is not None
        listed = subprocess.run(["pgrep", "-P", str(self._outer.pid)], capture_output=True, text=True)
        return listed.stdout.strip() or None

    def command(self, *command: str) -> list[str]:
        """The argument list that runs a command there."""
        first = self._first()
        assert first is not None, "the machine is off"
        return ["nsenter", "-t", first, "--all", "--", *command]

    def run(self, *command: str, check: bool = True, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command there, to its end."""
        done = subprocess.run(
            self.command(*command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file there."""
        put = f'umask 077; mkdir -p -m 755 "$(dirname {path})"; cat > {path}; chmod {mode:o} {path}'
        subprocess.run(self.command("sh", "-c", put), input=text, text=True, check=True)

    def drop_in(self, unit: str, *lines: str) -> None:
        """Change a service, or all of a template."""
        # Of two files of one name systemd reads only the instance's.
        self.write(f"/etc/systemd/system/{unit}.d/{unit}.conf", "\n".join(["[Service]", *lines, ""]))
        self.run("systemctl", "daemon-reload")

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def journal(self, unit: str) -> str:
        """What a unit has logged, and systemd about it."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout

    def events(self, unit: str, event: str) -> list[dict[str, str]]:
        """The entries of a unit about an event, with their fields."""
        how = ("journalctl", "--no-pager", "-o", "json", "-u", unit, f"BARCAST_EVENT={event}")
        return [json.loads(line) for line in self.run(*how).stdout.splitlines()]

    def wait(self, what: str, condition: Callable[[], object], seconds: float = 40) -> None:
        """Wait until a condition holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"waited in vain for {what}"
            time.sleep(0.1)

    def off(self) -> None:
        """Switch it off, without asking."""
        if self._outer is not None:
            self._outer.kill()
            self._outer.wait()
            for _ in range(50):
                try:
                    for inner in sorted(self._group.glob("**/"), reverse=True):
                        inner.rmdir()
                    return
                except OSError:
                    time.sleep(0.1)


def _become(layer: Path, *binds: str) -> None:
    """Build the machine's files in namespaces that are ours, and become its systemd."""

    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True)

    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "tmpfs", str(layer))
    root = layer / "root"
    for name in ("upper", "work", "root"):
        (layer / name).mkdir()
    options = f"lowerdir=/,upperdir={layer}/upper,workdir={layer}/work"
    mount("-t", "overlay", "-o", options, "overlay", str(root))
    mount("-t", "proc", "proc", str(root / "proc"))
    mount("-t", "sysfs", "sysfs", str(root / "sys"))
    mount("-t", "cgroup2", "cgroup2", str(root / "sys/fs/cgroup"))
    for name, mode in (("dev", "755"), ("run", "755"), ("tmp", "1777")):
        mount("-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", str(root / name))
    for name in DEVICES:
        (root / "dev" / name).touch()
        mount("--bind", f"/dev/{name}", str(root / "dev" / name))
    for name, kind, how in (
        ("shm", "tmpfs", "mode=1777"),
        ("pts", "devpts", "newinstance,ptmxmode=0666"),
        ("mqueue", "mqueue", "rw"),  # PrivateDevices wants to find it
    ):
        (root / "dev" / name).mkdir()
        mount("-t", kind, "-o", how, kind, str(root / "dev" / name))
    for name, to in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0")):
        (root / "dev" / name).symlink_to(to)
    for name, number in (("stdout", 1), ("stderr", 2)):
        (root / "dev" / name).symlink_to(f"/proc/self/fd/{number}")
    units = root / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    (units / "machine.target").write_text(TARGET)
    (root / "etc/machine-id").write_text("5" * 32 + "\n")
    for pair in binds:
        here, there = pair.split(":")
        (root / there.lstrip("/")).mkdir(parents=True, exist_ok=True)
        mount("--rbind", here, str(root / there.lstrip("/")))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    (root / "old").mkdir()
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "old"], check=True)
    subprocess.run(["umount", "-l", "/old"], check=True)
    mount("--make-rshared", "/")  # a private root keeps credentials from units
    environment = {"container": "test", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    arguments = [str(SYSTEMD), "--system", "--unit=machine.target", "--show-status=no"]
    os.execve(SYSTEMD, arguments, environment)


if __name__ == "__main__":
    _become(Path(sys.argv[1]), *sys.argv[2:])
