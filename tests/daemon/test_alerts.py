"""Alert rules, dashboard and metrics: what is asked for exists, and alerts fire when they should."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.daemon.living import LEAST, at_work, daemon, deliver
from tests.fakes import MINUTE, START, bar
from tests.rim import SECOND, Message, play

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES, TESTS = DEPLOY / "prometheus" / "rules.yml", DEPLOY / "prometheus" / "rules_test.yml"
DASHBOARD = DEPLOY / "grafana" / "barcast.json"
SCRAPED = {"up"}
"""What Prometheus says of a target by itself."""


@pytest.fixture
def promtool():
    """Runs promtool. Its absence is a failure: a skipped check is not a passed one."""
    places = (ROOT / ".tools/usr/bin/promtool", Path("/usr/bin/promtool"), Path("/usr/local/bin/promtool"))
    program = shutil.which("promtool") or next((str(p) for p in places if p.is_file()), None)
    if program is None:
        pytest.fail("promtool is missing: run `make test`, which gets it, or `apt-get install prometheus`")

    def call(*arguments, stdin=None):
        run = subprocess.run(
            [program, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=120
        )
        return run.returncode, run.stdout + run.stderr

    return call


@pytest.fixture
def text(tmp_path):
    """What /metrics of a daemon at work says."""
    made = daemon(tmp_path, LEAST, START + 400 * MINUTE + SECOND)

    async def story():
        async with at_work(made):
            await deliver(made, Message.of(*(bar("A", m) for m in range(1, 400))))
            await deliver(made, Message.of(bar("A", 400)))
            return (await made.metrics.text()).decode()

    return play(story())


def known(text):
    """The names of series in a text of metrics, also where there is no value yet."""
    families = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.M))
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + part for name, kind in families.items() for part in parts.get(kind, ("",))}


def expressions():
    """Every expression of the dashboard, with what Grafana would put into it."""
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    asked += [a["expr"] for a in board["annotations"]["list"]]
    return [expression.replace("$__rate_interval", "5m") for expression in asked]


def named(expression):
    """The metrics that an expression asks for."""
    return set(re.findall(r"\b((?:barcast|process)_\w+|up)\b", expression))


def alerts():
    """The alerts of the rules: name -> its lines."""
    return {part.split("\n")[0]: part for part in RULES.read_text().split("- alert: ")[1:]}


def test_what_is_asked_for_exists(text):
    """Every metric that a rule, its test or the dashboard names is one of the daemon's."""
    rules = set().union(*(named(line) for line in RULES.read_text().splitlines() if "http" not in line))
    boards = set().union(*map(named, expressions()))
    variables = named(json.dumps(json.loads(DASHBOARD.read_text())["templating"]))
    assert len(rules) > 15
    assert len(boards) > 30
    assert "barcast_info" in variables
    assert rules | named(TESTS.read_text()) | boards | variables <= known(text) | SCRAPED


def test_what_there_is_is_shown(text):
    """The dashboard shows every metric of the daemon: none is counted for nobody."""
    shown = set().union(*map(named, expressions())) | {"barcast_info"}
    mine = {name for name in known(text) if name.startswith("barcast_")}
    assert {name for name in mine if not name.endswith(("_sum", "_count"))} <= shown


def test_alerts_say_what_to_do():
    """Each alert has a severity, a summary, a description and its own place in the runbook."""
    headings = re.findall(r"^### (Alert: .+)$", (DEPLOY / "RUNBOOK.md").read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(":", "").replace(" ", "-") for heading in headings}
    found = alerts()
    assert len(found) > 12
    for name, lines in found.items():
        assert re.search(r"severity: (critical|warning)", lines), name
        assert re.search(r'summary: "{{ \$labels.instance }}: ', lines), name
        assert 'description: "' in lines, name
        [anchor] = re.findall(r"runbook_url: deploy/RUNBOOK.md#(\S+)", lines)
        assert anchor in anchors, name
        assert anchor == "alert" + re.sub("([A-Z])", r"-\1", name.removeprefix("Barcast")).lower()


def test_each_alert_is_tested_both_ways():
    """For every alert there is a moment at which it fires and one at which it does not."""
    told = TESTS.read_text()
    for name in alerts():
        assert re.search(rf"alertname: {name}, eval_time: \w+, exp_alerts: \[\]", told), name
        assert re.search(rf"alertname: {name}\n +eval_time: \w+\n +exp_alerts:\n +- exp_labels", told), name


def test_dashboard_is_in_order():
    """Ids are unique, nothing overlaps, every panel says what it shows, and asks the chosen data source."""
    board = json.loads(DASHBOARD.read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) == 23
    for panel in panels:
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"].endswith(".")
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert sources == [{"type": "prometheus", "uid": "${datasource}"}] * len(sources)
            assert all("$instance" in target["expr"] for target in panel["targets"])
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "job", "instance"]


@pytest.mark.promtool
def test_rules_fire_when_they_should(promtool):
    """Rules and configuration are valid, and every alert fires and stays silent as its test says."""
    for arguments in (("check", "config", RULES.parent / "prometheus.yml"), ("test", "rules", TESTS)):
        status, said = promtool(*arguments)
        assert status == 0, said


@pytest.mark.promtool
def test_a_rule_that_never_fires_is_found(promtool, tmp_path):
    """The control: with another threshold the tests of the rules fail."""
    rules = RULES.read_text()
    assert rules.count("barcast_overdue_seconds > 300") == 1
    (tmp_path / "rules.yml").write_text(rules.replace("_seconds > 300", "_seconds > 3e9"))
    (tmp_path / "rules_test.yml").write_text(TESTS.read_text())
    status, said = promtool("test", "rules", tmp_path / "rules_test.yml")
    assert status == 1
    assert "BarcastNoBars" in said


@pytest.mark.promtool
def test_metrics_are_as_prometheus_wants_them(promtool, text):
    """What the daemon says passes promtool's checks of names, units, types and texts."""
    status, said = promtool("check", "metrics", stdin=text)
    assert (status, said) == (0, "")
    status, said = promtool("check", "metrics", stdin=text.replace("# HELP barcast_deaf", "# HELP barcast_x"))
    assert status != 0


@pytest.mark.promtool
def test_expressions_of_the_dashboard_parse(promtool, tmp_path):
    """Each is accepted as the expression of a recording rule; a broken one is not."""
    rules = [
        {"record": f"shown:{i}", "expr": expression.replace("$job", "a|b").replace("$instance", "c")}
        for i, expression in enumerate(expressions())
    ]
    path = tmp_path / "rules.yml"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    status, said = promtool("check", "rules", path)
    assert status == 0, said
    assert f"{len(rules)} rules found" in said
    rules[0]["expr"] += ")"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert promtool("check", "rules", path)[0] == 1
