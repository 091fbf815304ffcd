"""Rules of the code base that no type checker knows: where time, randomness and heavy imports may be."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "strategies", "daemon", "backtest")
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
ROOTS = {"daemon/app.py", "backtest/replay.py"}
RIMS = {
    *(name for name in SOURCES if name.startswith("backtest/cli/") and name != "backtest/cli/screen.py"),
    "backtest/demo.py",
    "daemon/client.py",
}

OUTSIDE = re.compile(
    r"""time\.(time|time_ns|monotonic|monotonic_ns|perf_counter|perf_counter_ns|localtime|gmtime)
    |datetime\.(datetime\.)?(now|utcnow|today)|(datetime\.)?date\.today
    |random\..*|secrets\..*|os\.(urandom|getrandom|environ(\..*)?|getenv)|uuid\.uuid[14]
    |numpy\.random\.(?!default_rng$|Generator$|SeedSequence$).*
    |torch\.(seed|manual_seed|random\..*|initial_seed)""",
    re.VERBOSE,
)
"""Names that ask the operating system for the time, randomness or the environment, or a global generator."""


def names(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for, wherever in the module it is imported."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` of an attribute chain that begins with a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return None


def asks_outside(source: str) -> list[tuple[int, str]]:
    """(line, name) of every use, called or handed on, of what only the rims may use."""
    tree = ast.parse(source)
    known, found = names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            head, _, rest = (dotted(node) or "").partition(".")
            if head in known:
                full = known[head] + (f".{rest}" if rest else "")
                if OUTSIDE.fullmatch(full):
                    found.append((node.lineno, full))
    for node in ast.walk(tree):  # default_rng() without a seed asks the operating system for one
        if isinstance(node, ast.Call) and not node.args and not node.keywords:
            head, _, rest = (dotted(node.func) or "").partition(".")
            full = known.get(head, "") + (f".{rest}" if rest else "")
            if full.endswith("random.default_rng"):
                found.append((node.lineno, full))
    return found


def imports(source: str) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def broad_handlers(source: str) -> list[int]:
    """Lines of handlers that catch everything, alone or in a tuple, and do not end in another error."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in kinds):
                found.append(node.lineno)
        elif isinstance(node, ast.Call) and (dotted(node.func) or "").endswith("suppress"):
            found += [node.lineno for a in node.args if dotted(a) in ("Exception", "BaseException")]
    return found


def prints(source: str) -> list[int]:
    """Lines that print."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def undocumented(source: str) -> list[str]:
    """Public functions, classes and methods without a docstring; `the module` when it has none."""

    def walk(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if child.name.startswith("_"):
                continue
            if ast.get_docstring(child) is None:
                yield prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")

    tree = ast.parse(source)
    return [*(() if ast.get_docstring(tree) else ("the module",)), *walk(tree, "")]


def tracked() -> list[str]:
    """The files that git knows."""
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in run.stdout.split("\0") if name]


def barcast(*arguments: str, script: str = "barcast.backtest.cli.main()") -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh interpreter; standard error ends with the packages it imported."""
    program = (
        "import sys, atexit, barcast.backtest.cli\n"
        "tops = lambda: print('IMPORTED', *{m.split('.')[0] for m in sys.modules}, file=sys.stderr)\n"
        f"atexit.register(tops)\nsys.argv = ['barcast', *sys.argv[1:]]\n{script}\n"
    )
    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=env, timeout=60
    )


def imported(run: subprocess.CompletedProcess[str]) -> set[str]:
    """The packages that a run of the command line had imported when it ended."""
    return set(run.stderr.splitlines()[-1].split()[1:])


HEAVY = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "lightgbm", "plotly"}


def test_help_starts_without_heavy_packages() -> None:
    """`--help` answers at once: nothing that takes seconds to import is imported, not even polars."""
    run = barcast("--help")
    assert run.returncode == 0
    assert "backtest" in run.stdout
    assert not imported(run) & (HEAVY | {"polars"})


def test_check_starts_without_torch(tmp_path: Path) -> None:
    """`barcast check` says what a configuration means without loading a model's libraries."""
    config = tmp_path / "barcast.toml"
    config.write_text('instance = "desk"\nstate_dir = "state"\ntimeframe = "1m"\n')
    run = barcast("check", str(config))
    assert run.returncode == 0
    assert "desk" in run.stdout
    assert not imported(run) & HEAVY


def test_imports_of_a_run_are_seen() -> None:
    """The control: a run that imports torch is found out."""
    run = barcast("--help", script="import torch; barcast.backtest.cli.main()")
    assert "torch" in imported(run)


def test_check_of_a_bad_file_says_a_sentence_for_each_fault(tmp_path: Path) -> None:
    """A bad file ends in exit status 78 and one line for each fault: no traceback, nothing wrapped."""
    config = tmp_path / "a-name-that-is-long-enough-to-need-wrapping-on-a-terminal" / "barcast.toml"
    config.parent.mkdir()
    config.write_text('instance = "desk"\nstate_dir = "s"\ntimeframe = "7m"\nmax_wait = 2\n[mqtt]\nprt = 1\n')
    run = barcast("check", str(config))
    lines = run.stderr.splitlines()[:-1]
    assert run.returncode == 78
    assert run.stdout == ""
    assert [line.removeprefix("error: ").removeprefix(f"{config}: ").split(":")[0] for line in lines] == [
        "timeframe",
        "max_wait",
        "mqtt.prt",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.time()",
        "import time as t\nt.time_ns()",
        "from time import monotonic\nmonotonic()",
        "def f():\n    from time import perf_counter as now\n    return now()",
        "import time\nclock = time.time",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime, UTC\ndatetime.now(UTC)",
        "from datetime import date\ndate.today()",
        "import random\nrandom.choice([1])",
        "from random import Random\nRandom()",
        "import numpy as np\nnp.random.seed(0)",
        "import numpy as np\nnp.random.rand(3)",
        "import numpy as np\nnp.random.default_rng()",
        "from numpy.random import normal\nnormal()",
        "import os\nos.urandom(4)",
        "import os\nos.environ['HOME']",
        "import os\nos.environ.get('HOME')",
        "from os import getenv\ngetenv('HOME')",
        "import secrets\nsecrets.token_hex()",
        "import uuid\nuuid.uuid4()",
        "import torch\ntorch.manual_seed(0)",
    ],
)
def test_planted_clock_or_dice_is_found(source: str) -> None:
    """The control: however it is imported, a clock, a global generator or the environment is found."""
    assert asks_outside(source)


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.random.default_rng(3).normal()",
        "import torch\ntorch.Generator().manual_seed(0)",
        "def f(time, clock):\n    return time.now() + clock.time()",
        "from datetime import datetime\ndatetime.fromtimestamp(0)",
        "import os\nos.fsync(0)",
    ],
)
def test_given_clock_or_generator_is_allowed(source: str) -> None:
    """Time that comes as an argument and generators with a seed are what the rule asks for."""
    assert asks_outside(source) == []


@pytest.mark.parametrize("name", sorted(set(SOURCES) - ROOTS - RIMS))
def test_only_the_rims_ask_the_operating_system(name: str) -> None:
    """Below the composition roots nothing asks for time, randomness or the environment."""
    assert asks_outside(SOURCES[name]) == []


def test_client_reads_the_clock_alone() -> None:
    """The client runs in other programs: of the operating system it asks the time, unless it is given one."""
    assert {use for _, use in asks_outside(SOURCES["daemon/client.py"])} == {"time.time_ns"}


def test_replay_root_needs_no_clock() -> None:
    """Of the two composition roots only the live one reads a clock: a replay is a function of its input."""
    assert asks_outside(SOURCES["backtest/replay.py"]) == []
    assert {use for _, use in asks_outside(SOURCES["daemon/app.py"])} == {
        "time.time_ns",
        "datetime.datetime.now",
        "secrets.token_hex",
        "os.environ.get",
        "os.environ",
    }


def test_broad_handlers_are_found() -> None:
    """The control: each spelling of catching everything is counted."""
    body = "try:\n    f()\nexcept {}:\n    pass\n"
    kinds = ("Exception", "(ValueError, Exception)", "BaseException as e", "")
    found = [broad_handlers(body.format(kind)) for kind in kinds]
    assert found == [[3]] * len(kinds)
    assert broad_handlers("with contextlib.suppress(Exception):\n    f()\n") == [1]
    assert broad_handlers(body.format("ValueError")) == []
    assert broad_handlers("try:\n    f()\nexcept Exception as e:\n    raise ValueError from e\n") == []


def test_one_broad_handler() -> None:
    """There is one handler for whatever goes wrong: around the scheduled job.

    What a user's own strategy raises is given its name and raised on.
    """
    found = [name for name, source in SOURCES.items() for _ in broad_handlers(source)]
    assert found == ["daemon/retraining.py"]


def test_only_scripts_print() -> None:
    """What the libraries have to say is returned or logged; `print` is for the command line and a script."""
    assert prints("def f():\n    print('x')") == [2]
    printing = {name for name, source in SOURCES.items() if prints(source)}
    commands = {f"backtest/cli/{name}.py" for name in ("models", "operators", "quants")}
    assert printing <= {*commands, "backtest/sample/build.py"}


def test_missing_docstrings_are_found() -> None:
    """The control: modules, classes, functions and methods are looked at, private ones are not."""
    source = "class A:\n    def f(self): ...\n    def _g(self): ...\nasync def h(): ...\ndef _i(): ...\n"
    assert undocumented(source) == ["the module", "A", "A.f", "h"]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_public_names_say_what_they_are(name: str) -> None:
    """Every public module, class, function and method has a docstring."""
    assert undocumented(SOURCES[name]) == []


def test_imports_are_found() -> None:
    """The control: imports at the top, inside functions and of submodules are all seen."""
    source = "import torch.nn as nn\ndef f():\n    from paho.mqtt import client\nfrom os import path\n"
    assert imports(source) == {"torch", "paho", "os"}


@pytest.mark.parametrize(
    ("package", "places"),
    [
        ("torch", "models/"),
        ("diffusers", "models/"),
        ("accelerate", "models/optimiser.py models/training.py models/ldm4ts/training.py"),
        ("flash_attn", "models/ldm4ts/attention.py"),
        ("sageattention", "models/ldm4ts/attention.py"),
        ("transformers", "models/ldm4ts/language.py"),
        ("safetensors", "models/"),
        ("lightgbm", "models/gbm.py"),
        ("aiomqtt", "daemon/mqtt.py backtest/demo.py"),
        ("paho", "daemon/mqtt.py"),
        ("apscheduler", "daemon/schedule.py"),
        ("exchange_calendars", "daemon/calendar.py"),
        ("sqlite3", "daemon/journal.py"),
        ("pg8000", "daemon/postgres.py"),
        ("prometheus_client", "daemon/metrics.py"),
        ("starlette", "daemon/http.py"),
        ("uvicorn", "daemon/http.py"),
        ("pydantic", "daemon/config.py"),
        ("plotly", "backtest/"),
        ("typer", "backtest/cli/"),
        ("iotcore", "backtest/demo.py"),
        ("joblib", "backtest/workers.py"),
        ("ray", "backtest/workers.py"),
        ("distributed", "backtest/workers.py"),
        ("optuna", "backtest/grid.py"),
    ],
)
def test_third_parties_have_one_place(package: str, places: str) -> None:
    """Each outside library is known to one file or package only, and is used there."""
    users = [name for name, source in SOURCES.items() if package in imports(source)]
    assert [name for name in users if not name.startswith(tuple(places.split()))] == []
    assert users


def test_bare_package_names_are_not_imported() -> None:
    """`import models` would be a second module object: the four packages are `barcast.*` everywhere."""
    files = [name for name in tracked() if name.endswith(".py") and (ROOT / name).is_file()]
    assert "tests/test_hygiene.py" in files
    assert [name for name in files if imports((ROOT / name).read_text()) & set(PACKAGES)] == []


def test_links_of_the_import_name_are_in_git() -> None:
    """The four links that make `barcast` importable are links in git, and relative ones."""
    run = subprocess.run(
        ["git", "ls-files", "-s", ".dev"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    entries = {line.split("\t")[1]: line.split()[0] for line in run.stdout.splitlines()}
    assert entries == {f".dev/barcast/{package}": "120000" for package in PACKAGES}
    assert {name: os.readlink(ROOT / name) for name in entries} == {
        f".dev/barcast/{package}": f"../../{package}" for package in PACKAGES
    }


def test_no_path_of_one_machine_is_in_git() -> None:
    """No tracked text names a directory of the machine on which it was written."""
    private = re.compile(rb"/(work|home|root|Users)/\w")
    found = []
    for name in tracked():
        path = ROOT / name
        if path.is_symlink() or not path.is_file() or name == "tests/test_hygiene.py":
            continue
        content = path.read_bytes()
        if b"\0" not in content:
            found += [(name, match.group()) for match in private.finditer(content)]
    assert private.search(b"see /" + b"home/y")
    assert found == []
