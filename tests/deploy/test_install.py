"""The script that installs: again, upwards, back, away. Without a network or root."""

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Host:
    """Another root to install into, from a copy of this source tree that a test may change."""

    def __init__(self, folder):
        self.root, self.tree = folder / "root", folder / "tree"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_symlink() or (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name, follow_symlinks=False)
        # Packages are those that this test runs with: pip gets none, and needs no network.
        packages = next(path for path in site.getsitepackages() if (Path(path) / "pip").is_dir())
        self.environment = os.environ | {
            "DESTDIR": str(self.root),
            "PYTHON": sys.executable,
            "PYTHONPATH": packages,
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
        }

    def do(self, *arguments, **environment):
        """Run the script; its exit status and what it says."""
        script = ["sh", str(self.tree / "deploy/install.sh"), *arguments]
        done = subprocess.run(script, env=self.environment | environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def link(self, name):
        """Where `current` or `previous` points to."""
        link = self.root / "opt/barcast" / name
        return os.readlink(link) if link.is_symlink() else None

    @property
    def releases(self):
        return sorted(f"releases/{path.name}" for path in (self.root / "opt/barcast/releases").iterdir())

    @property
    def etc(self):
        return self.root / "etc/barcast"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("host"))


def test_first_installation(host):
    """A release, its units, a configuration that it accepts, and a password that nobody else reads."""
    status, said = host.do("install", "desk")
    assert status == 0, said
    assert host.link("current") == host.releases[0]
    assert host.link("previous") is None
    program = host.root / "opt/barcast/current/bin/barcast"
    assert program.read_text().startswith(f"#!{host.root}/opt/barcast/{host.link('current')}/bin/python")
    text = (host.etc / "desk.toml").read_text()
    for line in (
        'instance = "desk"',
        'state_dir = "/var/lib/barcast/desk"',
        'password_file = "desk.password"',
    ):
        assert f"\n{line}" in text
    password = host.etc / "desk.password"
    assert (password.stat().st_mode & 0o777, len(password.read_text())) == (0o600, 48)
    units = sorted(path.name for path in (host.root / "etc/systemd/system").iterdir())
    assert units == [path.name for path in sorted((ROOT / "deploy").glob("barcast*.s*"))]
    assert "systemctl enable --now barcast@desk" in said
    assert not (host.tree / "build").exists()  # the tree stays as it was


def test_again_changes_nothing(host):
    """The same tree is the same release, and what the operator has edited stays."""
    before = host.link("current")
    (host.etc / "desk.toml").write_text((host.etc / "desk.toml").read_text() + "# edited\n")
    password = (host.etc / "desk.password").read_text()
    status, said = host.do("install", "desk")
    assert status == 0, said
    assert "installing" not in said
    assert (host.link("current"), host.link("previous"), host.releases) == (before, None, [before])
    assert (host.etc / "desk.toml").read_text().endswith("# edited\n")
    assert (host.etc / "desk.password").read_text() == password


def test_release_that_cannot_read_the_configuration_is_not_switched_to(host):
    """The new release checks each configuration first; when it refuses one, the old one goes on."""
    before, config = host.link("current"), host.tree / "daemon/config.py"
    text = config.read_text()
    config.write_text(text.replace("    instance: Segment\n", "    instance: Segment\n    desk: Segment\n"))
    status, said = host.do("install")
    config.write_text(text)
    assert status == 1
    assert "desk.toml: desk: missing" in said
    assert "nothing was changed" in said
    assert (host.link("current"), host.releases) == (before, [before])


def test_upgrade_and_the_way_back(host):
    """An upgrade keeps the release before it; a rollback brings that one and its units back, and forth."""
    first, unit = host.link("current"), host.tree / "deploy/barcast@.service"
    unit.write_text(unit.read_text().replace("RestartSec=10", "RestartSec=11"))
    status, said = host.do("install")
    assert status == 0, said
    second = host.link("current")
    assert second != first
    assert (host.link("previous"), host.releases) == (first, sorted([first, second]))
    installed = host.root / "etc/systemd/system/barcast@.service"
    assert "RestartSec=11" in installed.read_text()
    for now, other, seconds in ((first, second, 10), (second, first, 11)):
        status, said = host.do("rollback")
        assert (status, host.link("current"), host.link("previous")) == (0, now, other), said
        assert f"RestartSec={seconds}\n" in installed.read_text()


def test_older_releases_go(host):
    """A third release takes the place of the first."""
    before = host.link("current")
    with (host.tree / "README.md").open("a") as readme:
        readme.write("\n")
    assert host.do("install")[0] == 0
    assert host.releases == sorted([before, host.link("current")])


def test_failed_installation_leaves_nothing(host):
    """When pip fails, no half release stays, and the old one goes on."""
    before = host.link("current"), host.releases
    with (host.tree / "pyproject.toml").open("a") as project:
        project.write("[no table\n")
    status, said = host.do("install")
    assert status == 1, said
    assert "pip failed, as said above; nothing was changed" in said
    assert (host.link("current"), host.releases) == before
    shutil.copy(ROOT / "pyproject.toml", host.tree)


def test_configuration_may_name_what_the_current_release_holds(host):
    """It is checked with what it will find then; what is wrong with it is said of the file itself."""
    inside = "lib/python{}.{}/site-packages/barcast/backtest/sample/checkpoint".format(*sys.version_info)
    mine = host.etc / "mine.toml"
    text = 'instance = "mine"\nstate_dir = "x"\ntimeframe = "session"\ncalendar = "XNYS"\n'
    text += f'[model]\nfirst = "/opt/barcast/current/{inside}"\n'
    mine.write_text(text)
    status, said = host.do("install")
    assert status == 0, said
    mine.write_text(text.replace("checkpoint", "nothing"))
    status, said = host.do("install")
    assert (status, f"{mine}: model.first" in said, ".trial" in said) == (1, True, False), said
    mine.unlink()
    assert list(host.etc.glob(".*.trial")) == []


def test_program_is_found_by_its_name(host):
    """The command of the current release is on the path of whoever operates it."""
    assert os.readlink(host.root / "usr/local/bin/barcast") == "/opt/barcast/current/bin/barcast"


@pytest.mark.parametrize("verb", ["uninstall", "rollback"])
def test_verb_of_the_whole_is_not_taken_for_one_of_an_instance(host, verb):
    """Whoever names an instance does not mean all of them: nothing is done."""
    before = host.link("current"), host.releases
    status, said = host.do(verb, "desk")
    assert (status, "systemctl disable --now barcast@desk" in said) == (1, True)
    assert (host.link("current"), host.releases) == before


@pytest.mark.parametrize("name", ["Desk", "desk.toml", "../desk", "-desk", "a" * 21])
def test_name_that_no_user_can_have_is_refused(host, name):
    """The service's user is named after the instance."""
    status, said = host.do("install", name)
    assert status == 1
    assert "an instance is called by a-z, 0-9 and -, 20 characters at most" in said


def test_unknown_verb_and_python_are_named(host):
    """What cannot be done is said with what can."""
    assert host.do("upgrade") == (1, "install.sh: say install [NAME], rollback or uninstall\n")
    status, said = host.do("install", PYTHON="/bin/false")
    assert status == 1
    assert "Python 3.11 or newer is needed" in said


def test_whole_machine_needs_root(host):
    """Without another root it is root's to do, which is said before anything is touched."""
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--clear-groups", "sh", "-s"]
    else:
        command = ["sh", "-s"]
    script = (ROOT / "deploy/install.sh").read_bytes()
    done = subprocess.run([*command, "install"], input=script, capture_output=True, cwd="/")
    assert (done.returncode, done.stderr.decode()) == (1, "install.sh: run this as root\n")


def test_removal(host):
    """Programs and units go; configuration and password stay."""
    status, said = host.do("uninstall")
    assert status == 0, said
    assert not (host.root / "opt/barcast").exists()
    assert list((host.root / "etc/systemd/system").iterdir()) == []
    assert sorted(path.name for path in host.etc.iterdir()) == ["desk.password", "desk.toml"]
    status, said = host.do("rollback")
    assert (status, said) == (1, "install.sh: there is no release before the current one\n")
