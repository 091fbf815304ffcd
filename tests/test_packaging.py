"""What is installed: one name, four packages, their types and the sample, and nothing else."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of what git tracks, so that nothing that lies about gets in."""
    folder = tmp_path_factory.mktemp("packaging")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, copy = ROOT / name, folder / "tree" / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    built = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"),
            *("--quiet", "--disable-pip-version-check", "-w", str(folder / "dist"), str(folder / "tree")),
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = (folder / "dist").glob("barcast-*.whl")
    return zipfile.ZipFile(path)


def test_it_installs_one_name(wheel: zipfile.ZipFile) -> None:
    """A wheel puts `barcast` and its record into site-packages, and no `daemon` or `models` beside it."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    [record] = [top for top in tops if top.endswith(".dist-info")]
    assert tops == {"barcast", record}
    assert wheel.read(f"{record}/top_level.txt").decode().split() == ["barcast"]
    assert b"barcast = barcast.backtest.cli:main" in wheel.read(f"{record}/entry_points.txt")


def test_it_holds_every_module_and_all_data(wheel: zipfile.ZipFile) -> None:
    """All modules of the four packages are in it, with their types, the page, sample bars and checkpoint."""
    names = set(wheel.namelist())
    for package in ("models", "strategies", "daemon", "backtest"):
        modules = {f"barcast/{path.relative_to(ROOT)}" for path in (ROOT / package).rglob("*.py")}
        assert modules
        assert modules <= names
        assert f"barcast/{package}/py.typed" in names
    page = {f"barcast/{path.relative_to(ROOT)}" for path in (ROOT / "daemon/page").iterdir()}
    assert "barcast/daemon/page/index.html" in page
    assert page <= names
    sample = "barcast/backtest/sample"
    assert {
        f"{sample}/us_daily.parquet",
        f"{sample}/README.md",
        f"{sample}/checkpoint/model.json",
        f"{sample}/checkpoint/weights.safetensors",
        f"{sample}/ldm4ts/model.json",
        f"{sample}/ldm4ts/weights.safetensors",
    } <= names
    data = (ROOT / "backtest/sample/us_daily.parquet").read_bytes()
    assert wheel.read(f"{sample}/us_daily.parquet") == data


def test_it_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    """No tests, caches or working files are installed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    tracked = {f"barcast/{name}" for name in listed.stdout.decode().split("\0")}
    inside = {name for name in wheel.namelist() if name.startswith("barcast/")}
    assert inside - tracked == set()
    assert not [name for name in inside if "tests/" in name or "__pycache__" in name]


def test_it_runs_from_where_it_is_installed(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked elsewhere, all of it imports from there, the sample is found and the command answers."""
    wheel.extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import barcast.models, barcast.daemon.app, barcast.backtest.cli\n"
        "from barcast.backtest.sample import sample_bars, sample_checkpoint\n"
        "print(barcast.daemon.app.__file__, sample_bars(), sample_checkpoint(), sep='\\n')\n"
        "assert sample_bars().is_file() and (sample_checkpoint() / 'model.json').is_file()\n"
        "sys.argv = ['barcast', '--help']; barcast.backtest.cli.main()\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert all(line.startswith(str(tmp_path)) for line in run.stdout.splitlines()[:3])
    assert "Usage" in run.stdout
