"""The configuration: one TOML file, every fault named at once, nothing else listened to."""

import pytest

from barcast.daemon.config import load
from barcast.daemon.pipeline import Settings
from barcast.models import ConfigError

GOOD = """\
instance = "desk"
state_dir = "state"
timeframe = "15m"
calendar = "fx"
symbols = ["EURUSD", "GBPUSD"]
max_wait = "1500ms"

[mqtt]
host = "broker.example"
port = 8883
root = "prices/v1"
username = "barcast"
password_file = "secrets/password"
ca_file = "/etc/ssl/ca.pem"

[model]
first = "hs"
sampler = "ddim"
steps = 12

[[strategy]]
kind = "quantile-band"
params = { band = 0.5, horizon = 4 }

[[strategy]]
kind = "median-drift"
name = "drift.slow"

[retrain]
cron = "0 3 * * sun"
margin = 0.01

[rehearsal]
start = 2012-01-03T00:00:00Z
at = 2026-01-03T00:00:00+01:00
speed = 60
"""
LEAST = 'instance = "a"\nstate_dir = "s"\ntimeframe = "1m"\n'


@pytest.fixture
def write(tmp_path):
    """Write a configuration into a folder of its own; return the file."""

    def write(text):
        path = tmp_path / "conf" / "barcast.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def faults(path):
    """The sentences that say what is wrong with a file, without its name."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_children_read_what_the_daemon_goes_by(write, tmp_path):
    """All but the strategies, whose files may change, and with paths that hold in another folder."""
    more = '[verify]\ncron = "0 4 * * *"\n[journal]\nurl = "postgresql://a@h/b"\n[retrain.drift]\n'
    for text in (LEAST, GOOD + more):
        config, handed = load(write(text)), tmp_path / "handed.json"
        handed.write_text(config.text())
        assert config.changed_in(load(handed)) == ([], ["strategy"] * bool(config.strategy))


def test_everything_written_is_read(write):
    """Each key of a full file arrives, durations in nanoseconds and times with their zone."""
    config = load(write(GOOD))
    assert config.max_wait == 1_500_000_000
    assert (config.mqtt.host, config.mqtt.port, config.mqtt.root) == ("broker.example", 8883, "prices/v1")
    assert (config.model.name, config.model.first, config.model.sampler) == ("champion", "hs", "ddim")
    assert [(s.kind, s.name, s.params) for s in config.strategies()] == [
        ("quantile-band", "quantile-band", {"band": 0.5, "horizon": 4}),
        ("median-drift", "drift.slow", {}),
    ]
    assert config.retrain.margin == 0.01
    assert config.rehearsal.at.utcoffset().total_seconds() == 3600
    assert config.topics.deadletter == "prices/v1/deadletter/desk"
    assert config.bar_calendars().default.name == "fx"


def test_few_keys_are_enough(write):
    """Instance, state directory and timeframe suffice; the baseline serves until there is a champion."""
    config = load(write(LEAST))
    assert (config.model.name, config.model.first) == ("champion", "fhs")
    assert config.symbols == []
    assert config.retrain is None
    assert config.strategies() == ()


def test_every_fault_is_named_at_once(write):
    """One run names each wrong key by its dotted path, with the value that was given and what to write."""
    found = faults(
        write(
            """\
instanse = "desk"
state_dir = "state"
timeframe = "15m"
symbols = ["EURUSD", "eur/usd"]
max_wait = "2 seconds"
log_level = "loud"

[mqtt]
portt = 1883
port = 70000
root = "prices/#"

[model]
sampler = "dpmp"
steps = "many"

[[strategy]]
kind = "median-drift"

[[strategy]]
kind = "median-drit"

[[strategy]]
kind = "quantile-band"
params = { width = 2 }

[retrain]
cron = "0 3 * * *"
margin = 1.5
nice = 20

[rehearsal]
start = 2012-01-03T00:00:00
at = 2026-01-03T00:00:00Z
speed = 0
"""
        )
    )
    expected = {
        "instance": ("missing",),
        "instanse": ("unknown key", "did you mean 'instance'?"),
        "symbols.1": ("'eur/usd'", "A-Z, 0-9"),
        "max_wait": ("'2 seconds'", "500ms, 2s, 5m"),
        "log_level": ("'loud'", "'debug', 'info', 'warning' or 'error'"),
        "mqtt.portt": ("unknown key", "did you mean 'port'?"),
        "mqtt.port": ("70000", "less than 65536"),
        "mqtt.root": ("'prices/#'", "without wildcards"),
        "model.sampler": ("'dpmp'", "choose one of angle, ddim"),
        "model.steps": ("'many'", "valid integer"),
        "strategy.1": ("median-drit", "median-drift"),
        "strategy.2": ("width", "band"),
        "retrain.margin": ("1.5", "less than 1"),
        "retrain.nice": ("20", "less than or equal to 19"),
        "rehearsal.start": ("write the time zone",),
        "rehearsal.speed": ("0", "greater than 0"),
    }
    said = dict(line.split(": ", 1) for line in found)
    assert len(said) == len(found)
    for key, parts in expected.items():
        assert key in said, f"{key} is not among {sorted(said)}"
        for part in parts:
            assert part in said[key], (key, said[key])
    assert set(said) == set(expected)


@pytest.mark.parametrize(
    ("text", "key", "parts"),
    [
        ('timeframe = "7m"', "timeframe", ("'7m'", "neither divides a day nor is whole days", "15m")),
        ('timeframe = "1 minute"', "timeframe", ("'1 minute'", "15m, or session")),
        ("timeframe = 15", "timeframe", ("15",)),
        ('timeframe = "session"\ncalendar = "XNYC"', "calendar", ("'XNYC'", "XNYS")),
        ('timeframe = "session"', "calendar", ("24x7", "session")),
    ],
)
def test_bar_closes_that_do_not_exist_are_refused(write, text, key, parts):
    """A timeframe or calendar that there is not is named beside the other faults, with what is possible."""
    found = faults(write(f'instance = "a"\nstate_dir = "s"\n{text}\nmax_wait = "never"\n'))
    said = dict(line.split(": ", 1) for line in found)
    assert "max_wait" in said
    assert key in said, found
    for part in parts:
        assert part in said[key]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('symbols = ["A", "B", "A"]\n', ("symbols", "repeat", "once")),
        ('[[strategy]]\nkind = "median-drift"\n' * 2, ("median-drift", "repeat", "name of its own")),
        ('[model]\nname = "fhs"\n[retrain]\ncron = "0 3 * * *"\n', ("model.name", "'fhs'", "[retrain]")),
        (
            "[rehearsal]\nspeed = 1\nat = 2026-01-03T00:00:00Z\nstart = 2012-01-03T00:00:00\n",
            ("rehearsal.start", "write the time zone", "2012-01-03T00:00:00Z"),
        ),
        ('[retrain]\ncron = "0 3 * *"\n', ("retrain.cron", "4 fields", "write five, or six")),
        ('[retrain]\ncron = "0 25 * * *"\n', ("retrain.cron", "0 25 * * *")),
        ('[model]\nsampler = "karras"\n', ("model.sampler", "refused", "1.8 times", "take dpmpp")),
        ('[model]\nsampler = "kdpm2"\nsteps = 2\n', ("model.steps", "steps = 2", "kdpm2", "3 to 400")),
        ("[model]\nsteps = 1\n", ("model.steps", "steps = 1", "dpmpp", "2 to 400")),
        ("version = 2\n", ("version", "2", "1")),
        ('[mqtt]\nroot = "$SYS"\n', ("mqtt.root", "'$SYS'")),
        ('max_wait = "0s"\n', ("max_wait", "greater than 0")),
        ("max_wait = 2\n", ("max_wait", "2", "number and a unit")),
        ('symbols = "A"\n', ("symbols", "'A'", "list; write it in brackets")),
        ('strategy = "median-drift"\n', ("strategy", "list; write [[strategy]]")),
        ('strategy = ["median-drift"]\n', ("strategy.0", "write [[strategy]] and")),
        ('mqtt = "localhost"\n', ("mqtt", "write [mqtt]")),
        ('[mqtt]\npassword_file = "x"\n', ("mqtt.password_file", "without mqtt.username", "write that")),
        ("[http]\n", ("http.port", "missing")),
        ("[http]\nport = 0\n", ("http.port", "greater than 0")),
        ('[http]\nport = 9464\nhost = ""\n', ("http.host", "at least 1")),
        ("[retrain]\ndrift = { coverage = 0 }\n", ("retrain.drift.coverage", "greater than 0")),
        ('[retrain]\nmax_age = "2 weeks"\n', ("retrain.max_age", "such as 500ms")),
        ("[retrain]\ndrift = { crp = 0.1 }\n", ("retrain.drift.crp", "did you mean 'crps'")),
    ],
)
def test_fault_is_said_with_its_remedy(write, text, parts):
    """What cannot work is said in one sentence that names the key and what to do."""
    [said] = faults(write(LEAST + text))
    for part in parts:
        assert part in said


@pytest.mark.parametrize("key", ["name", "first"])
def test_daily_bars_have_no_baseline_with_a_season(write, key):
    """A time-of-week factor is refused for bars of whole days, and taken for shorter ones."""
    text = f'[model]\n{key} = "har-s"\n'
    [said] = faults(write(LEAST.replace("1m", "1d") + text))
    assert said.startswith(
        "model: model 'har-s' needs hours of the week, which '1d' bars do not have; take 'har'"
    )
    assert getattr(load(write(LEAST + text)).model, key) == "har-s"


def test_instance_must_be_a_topic_segment(write):
    """The instance's name is part of topics: a slash in it would be another topic."""
    [said] = faults(write(LEAST.replace('"a"', '"a/b"')))
    assert said.startswith("instance: ")
    assert "'a/b'" in said


def test_unknown_key_without_a_likeness_lists_what_is_known(write):
    """When no known key resembles the unknown one, the known ones are listed."""
    [said] = faults(write(LEAST + "[mqtt]\nxyzzy = 1\n"))
    assert said == (
        "mqtt.xyzzy: unknown key; known here: host, port, root, username, password_file, ca_file, "
        "tls, plain_password"
    )


def test_missing_file_is_an_error(tmp_path):
    """Without the file nothing starts on defaults."""
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"instance = desk\n", b'instance = "d\xff"\n', b"[mqtt\n"])
def test_syntax_error_names_the_file(tmp_path, content):
    """What is not TOML is said with the file's name."""
    path = tmp_path / "barcast.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"barcast\.toml: not valid TOML"):
        load(path)


def test_json_without_keys_names_the_file(tmp_path):
    """What a daemon wrote for its children may be damaged, too."""
    path = tmp_path / "barcast.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"barcast\.json: .*it holds no table of keys"):
        load(path)


def test_paths_are_relative_to_the_file(write, tmp_path, monkeypatch):
    """Paths mean the same whatever the working directory is."""
    path = write(GOOD)
    monkeypatch.chdir(path.parent.parent)
    config = load(path.relative_to(tmp_path))
    assert config.state_dir == tmp_path / "conf" / "state"
    assert config.mqtt.password_file == tmp_path / "conf" / "secrets" / "password"
    assert str(config.mqtt.ca_file) == "/etc/ssl/ca.pem"


@pytest.mark.parametrize("key", ["name", "first"])
def test_model_directory_is_relative_to_the_file(write, tmp_path, monkeypatch, key):
    """A checkpoint directory beside the file is found from any working directory; names stay names."""
    path = write(LEAST + f'[model]\n{key} = "models/good"\n')
    (path.parent / "models" / "good").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert getattr(load(path).model, key) == str(tmp_path / "conf" / "models" / "good")
    (path.parent / "fhs").mkdir()
    assert getattr(load(write(LEAST + f'[model]\n{key} = "fhs"\n')).model, key) == "fhs"
    assert load(write(LEAST)).model.name == "champion"


def test_password_is_read_without_its_line_end(write):
    """The password is the file's content; the line end that editors add is not part of it."""
    path = write(GOOD.replace('ca_file = "/etc/ssl/ca.pem"', "plain_password = true"))
    secret = path.parent / "secrets" / "password"
    secret.parent.mkdir()
    secret.write_text("open sesame\n")
    address = load(path).mqtt.address("me")
    assert (address.username, address.password, address.tls) == ("barcast", "open sesame", None)


@pytest.mark.parametrize("key", ["password_file", "ca_file"])
def test_missing_secret_is_a_fault(write, key):
    """A password or CA file that is not there stops the start with its name, not a guess."""
    path = write(LEAST + f'[mqtt]\nusername = "u"\n{key} = "absent"\n')
    with pytest.raises(ConfigError, match=rf"mqtt\.{key}: .*conf/absent does not exist; create it"):
        load(path).mqtt.address("me")
    (path.parent / "absent").mkdir()
    with pytest.raises(ConfigError, match=rf"mqtt\.{key}: .*conf/absent is a folder; name the file"):
        load(path).mqtt.address("me")


@pytest.mark.parametrize(
    "host",
    ["mqtt://me:TOPSECRET@127.0.0.1", "me:TOPSECRET@desk", "TOPSECRET@desk", "desk:1883", "desk/x", "[::1]"],
)
def test_host_is_a_name_or_an_address(write, host):
    """What looks like a URL may hold a password: it is refused and never shown."""
    [said] = faults(write(LEAST + f'[mqtt]\nhost = "{host}"\n'))
    assert said == (
        "mqtt.host: write a name or an address alone; the port goes into mqtt.port, user and password into "
        "mqtt.username and mqtt.password_file"
    )


@pytest.mark.parametrize("host", ["localhost", "10.0.0.7", "::1", "fe80::1%eth0", "a_b.example"])
def test_names_and_addresses_are_hosts(write, host):
    """Also IPv6, with and without a zone."""
    assert load(write(LEAST + f'[mqtt]\nhost = "{host}"\n')).mqtt.host == host


def test_what_needs_a_restart_is_named_by_its_key(write):
    """A key of a table is named with its table; what a running daemon takes anew is told apart."""
    one = load(write(LEAST))
    more = 'symbols = ["A"]\n[mqtt]\nport = 1884\nroot = "x"\n'
    more += '[model]\nfirst = "hs"\nsteps = 3\n[http]\nport = 1\n'
    other = load(write(LEAST + more))
    assert one.changed_in(other) == (
        ["mqtt.port", "mqtt.root", "model.first", "http"],
        ["symbols", "model.steps"],
    )


def test_file_that_may_not_be_read_is_a_fault(write, monkeypatch):
    """It is there, and its reader is the wrong user."""
    path = write(LEAST)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refused)
    with pytest.raises(
        ConfigError, match=r"barcast\.toml: cannot be read \(Permission denied\); let this user"
    ):
        load(path)


def test_certificate_that_is_none_is_a_fault(write):
    """A CA file without a certificate in it is named, without a traceback of the TLS library."""
    path = write(LEAST + '[mqtt]\nca_file = "ca.pem"\n')
    (path.parent / "ca.pem").write_text("not a certificate\n")
    with pytest.raises(ConfigError, match=r"mqtt\.ca_file: .*ca\.pem"):
        load(path).mqtt.address("me")


def test_environment_is_ignored(write, monkeypatch, tmp_path):
    """No environment variable and no .env file changes a setting."""
    path = write(LEAST)
    plain = load(path)
    for name in ("INSTANCE", "instance", "CALENDAR", "calendar", "MAX_WAIT", "BARCAST_INSTANCE"):
        monkeypatch.setenv(name, "1h")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("calendar=fx\nlog_level=debug\n")
    assert load(path) == plain


def test_journalled_settings_come_back(write):
    """What is journalled of the settings decodes to the same settings."""
    settings = load(write(GOOD)).settings()
    assert Settings.decode(settings.encode()) == settings
    assert settings.max_wait == 1_500_000_000
    assert settings.symbols == ("EURUSD", "GBPUSD")


def test_journalled_settings_are_canonical(write):
    """The order in which keys are written changes no byte of the journal; a value does."""
    first = load(write(GOOD)).settings().encode()
    turned = GOOD.replace("{ band = 0.5, horizon = 4 }", "{ horizon = 4, band = 0.5 }")
    head, mqtt = turned.split("[mqtt]", 1)
    swapped = "\n".join(reversed(head.strip().splitlines())) + "\n[mqtt]" + mqtt
    assert swapped != GOOD
    assert load(write(swapped)).settings().encode() == first
    assert load(write(GOOD.replace("1500ms", "1501ms"))).settings().encode() != first


def test_symbols_keep_their_own_hours(tmp_path):
    """[calendars] names symbols by their calendar; a symbol has one, and the calendar has the timeframe."""
    path = tmp_path / "barcast.toml"
    start = 'instance = "x"\nstate_dir = "s"\ntimeframe = "1h"\n'
    path.write_text(f'{start}[calendars]\nfx = ["EURUSD", "USDJPY"]\nXNYS = ["AAPL"]\n')
    config = load(path)
    assert config.settings().calendars == {"EURUSD": "fx", "USDJPY": "fx", "AAPL": "XNYS"}
    assert config.bar_calendars().of("AAPL").name == "XNYS"
    assert config.bar_calendars().of("BTCUSD").name == "24x7"
    for table, said in (
        (
            'fx = ["EURUSD"]\nXNYS = ["EURUSD"]',
            "EURUSD is given more than one calendar; name each symbol once",
        ),
        ('XNYZ = ["AAPL"]', "did you mean"),
        ('fx = ["eurusd"]', "calendars.fx.0: a symbol is A-Z"),
    ):
        path.write_text(f"{start}[calendars]\n{table}\n")
        with pytest.raises(ConfigError, match=said):
            load(path)
    path.write_text(f"{start}max_jump = 0\n")
    with pytest.raises(ConfigError, match=r"max_jump: .*greater than 0"):
        load(path)
