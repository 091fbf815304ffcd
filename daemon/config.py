"""Settings of one instance, from one TOML file. Every wrong key is reported at once, with its path."""

import difflib
import ipaddress
import json
import re
import ssl
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from barcast.daemon.calendar import Calendar, Calendars
from barcast.daemon.gate import MARGIN
from barcast.daemon.journal import Place
from barcast.daemon.mqtt import Address
from barcast.daemon.pipeline import MAX_JUMP, Settings, StrategySettings
from barcast.daemon.postgres import Server
from barcast.daemon.schedule import cron
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import SYMBOL
from barcast.models import BASELINES, MOST_STEPS, ConfigError, check_sampler, open_model
from barcast.models.catalog import SAMPLER
from barcast.models.joint import check_pairs
from barcast.strategies import PATH

MOST_BYTES = 1_000_000
"""The longest file that is read: such settings take a few thousand bytes."""
ROOT_BYTES = 200
"""Of the root topic, at most."""
SHOWN, FAULTS = 200, 50
"""Characters of a value that a fault shows, and faults that are told of one file."""
_DEEP = re.compile(r"""(?<![\w"'-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""")
"""A key of so many parts: reading it takes the square of their number."""
_UNITS = {"ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86_400 * 10**9}


POSTGRESQL = "write postgresql://USER@HOST:PORT/DATABASE, or postgresql://USER@/DATABASE?host=/FOLDER"
LEAST_TOKEN = 16
"""Characters of a token, at least: 64 bits where they are hexadecimal."""
LONGEST_INSTANCE = 55
"""Characters of an instance whose name is part of a schema's: PostgreSQL cuts names after 63."""


def _duration(value: object) -> object:
    """Nanoseconds of a text such as 500ms, 2s, 5m, 1h or 1d."""
    match = re.fullmatch(r"(\d+)(ms|s|m|h|d)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("write a duration as a number and a unit, such as 500ms, 2s, 5m, 1h or 1d")
    duration = int(match[1]) * _UNITS[match[2]]
    if duration > 366 * _UNITS["d"]:
        raise ValueError("no duration is longer than 366d")
    return duration


def _symbol(value: str) -> str:
    if not SYMBOL.fullmatch(value):
        raise ValueError(
            "a symbol is A-Z, 0-9, '.', '_' or '-', at most 32 characters, and begins with A-Z or 0-9"
        )
    return value


def _segment(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value):
        raise ValueError("use letters, digits, '.', '_' and '-' only: it becomes a segment of a topic")
    return value


def _root(value: str) -> str:
    if not value or set(value) & set("+#\0") or value.startswith(("/", "$")) or value.endswith("/"):
        raise ValueError("use a topic without wildcards that neither begins nor ends with a slash")
    if (size := len(value.encode())) > ROOT_BYTES:
        raise ValueError(
            f"the root has {size} bytes; use at most {ROOT_BYTES}: topics are sent with each message"
        )
    return value


def _host(value: str) -> str:
    try:
        ipaddress.IPv6Address(value)
    except ValueError:
        if set(value) & set("/@:"):  # a URL, in which a password may be
            raise ValueError(
                "write a name or an address alone; the port goes into mqtt.port, user and password into "
                "mqtt.username and mqtt.password_file"
            ) from None
    return value


def _timeframe(value: str) -> str:
    try:
        Timeframe.parse(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return value


def _cron(value: str) -> str:
    try:
        cron(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return value


def _is_dir(path: Path) -> bool:
    """Whether there is such a directory; one that cannot be, or that nobody lets us see, is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _zoned(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("write the time zone, such as 2012-01-03T00:00:00Z")
    return value


def _written_as_pairs(value: object) -> object:
    def pair(one: object) -> bool:
        return isinstance(one, list | tuple) and len(one) == 2 and all(type(x) in (int, float) for x in one)

    if not isinstance(value, list | tuple) or not all(pair(one) for one in value):
        raise ValueError("write pairs, how far up and how far down, such as [[2, 1]]")
    return value


def _pairs(value: list[tuple[float, float]]) -> list[tuple[float, float]]:
    try:
        return list(check_pairs(value))
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _model(value: str) -> str:
    if value in ("champion", *BASELINES) or re.fullmatch(r"[0-9a-f]{16}", value) or _is_dir(Path(value)):
        return value
    raise ValueError(
        f"{_shown(value)} is neither champion, nor a baseline ({', '.join(BASELINES)}), nor a model id, nor "
        "a checkpoint directory; name one of these"
    )


def _sampler(value: str, steps: int | None = None) -> str:
    try:
        check_sampler(value, steps)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return value


def _postgresql(value: str) -> str:
    try:
        url = urlsplit(value)
        port, query = url.port, parse_qsl(url.query, strict_parsing=bool(url.query))
    except ValueError as error:
        raise ValueError(f"{error}; {POSTGRESQL}") from error
    if url.password is not None:
        raise ValueError(
            "a password does not belong here: write it into a file, and name that as password_file"
        )
    whole = url.scheme == "postgresql" and url.username and len(url.path) > 1 and not url.fragment
    hosts = [text for key, text in query if key == "host" and text.startswith("/")]
    if not whole or len(hosts) != len(query) or len(hosts) + bool(url.hostname) != 1 or port == 0:
        raise ValueError(POSTGRESQL)
    return value


def duration(text: str) -> int:
    """Nanoseconds of a text such as 30m. Raise ConfigError for any other."""
    try:
        return int(str(_duration(text)))
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}") from error


def root_topic(text: str) -> str:
    """A root topic that a configuration may have. Raise ConfigError for any other text."""
    try:
        return _root(text)
    except ValueError as error:
        raise ConfigError(f"root: {_shown(text)}: {error}") from error


RELOADED = (
    "symbols",
    "max_wait",
    "max_jump",
    "keep",
    "model.sampler",
    "model.steps",
    "model.touch",
    "strategy",
    "retrain",
    "verify",
)
"""Keys that a running daemon takes anew; any other needs a restart."""
_SECRET = (("journal", "url"), ("mqtt", "host"))
"""Keys whose wrong values are not shown: somebody may have written a password there."""

Duration = Annotated[
    int,
    BeforeValidator(_duration),
    Field(gt=0),
    PlainSerializer(lambda given: f"{given // _UNITS['ms']}ms", when_used="json"),
]
Symbol = Annotated[str, AfterValidator(_symbol)]
Segment = Annotated[str, AfterValidator(_segment)]
Zoned = Annotated[datetime, AfterValidator(_zoned)]


def _password(table: str, file: Path | None) -> str | None:
    """The password in a file that a table names."""
    return _secret(f"{table}.password_file", "password", file)


def _secret(key: str, what: str, file: Path | None) -> str | None:
    """What is in a file that a key names."""
    if file is None:
        return None
    key = f"{key}: {file}"
    _check_there(key, file)
    try:
        secret = file.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key} cannot be read ({type(error).__name__}); write the {what} as UTF-8 text that this user "
            "may read"
        ) from error
    if not secret:
        raise ConfigError(f"{key} is empty; write the {what} into it")
    return secret


def _check_there(key: str, file: Path) -> None:
    """Raise ConfigError where there is no such file."""
    if _is_dir(file):
        raise ConfigError(f"{key} is a folder; name the file in it")
    if not _is_file(file):
        raise ConfigError(f"{key} does not exist; create it or drop the key")


def _trust(table: str, file: Path | None) -> ssl.SSLContext:
    """TLS that verifies a server by the authority in a file, or by those that the system trusts."""
    if file is not None:
        _check_there(f"{table}.ca_file: {file}", file)
    try:
        return ssl.create_default_context(cafile=None if file is None else str(file))
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(
            f"{table}.ca_file: {file} holds no certificate ({reason}); write one in PEM form"
        ) from error


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Mqtt(_Section):
    """The broker. A password is read from a file, so that it is in no process list and no log.

    With `tls`, or a `ca_file`, the broker must prove by a certificate that it is `host`: one of an authority
    in that file or, without it, one that the system trusts. There is no way to take another. A password goes
    to another machine in the clear only with `plain_password`.
    """

    host: Annotated[str, AfterValidator(_host)] = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=1883, gt=0, lt=65536)
    root: Annotated[str, AfterValidator(_root)] = "barcast/v1"
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    tls: Annotated[bool | None, Field(validate_default=True)] = None
    plain_password: Annotated[bool, Field(validate_default=True)] = False

    @field_validator("password_file")
    @classmethod
    def _has_a_user(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file is not None and not info.data.get("username"):
            raise ValueError(
                "a password without mqtt.username is told to no broker; write that, too, or drop this"
            )
        return file

    @field_validator("tls")
    @classmethod
    def _is_not_off_and_on(cls, tls: bool | None, info: ValidationInfo) -> bool | None:
        if tls is False and info.data.get("ca_file") is not None:
            raise ValueError("mqtt.ca_file is for TLS, which tls = false turns off; drop one of the two")
        return tls

    @field_validator("plain_password")
    @classmethod
    def _is_hidden_or_meant(cls, plain: bool, info: ValidationInfo) -> bool:
        given = info.data
        secret = given.get("password_file") is not None
        host = given.get("host", "localhost")
        hidden = given.get("tls") or given.get("ca_file") is not None or is_loopback(host)
        if secret and not hidden and not plain:
            raise ValueError(
                f"the password would go to {host} in the clear; set mqtt.tls = true, with mqtt.ca_file for "
                "an authority of your own, or mqtt.plain_password = true where the way there is safe"
            )
        return plain

    def address(self, client_id: str) -> Address:
        """What the link needs, with the files read."""
        return Address(self.host, self.port, client_id, self.username, self._password(), self._tls())

    def _password(self) -> str | None:
        return _password("mqtt", self.password_file)

    def _tls(self) -> ssl.SSLContext | None:
        return _trust("mqtt", self.ca_file) if self.tls or self.ca_file else None


class JournalServer(_Section):
    """A journal in PostgreSQL instead of a file: several daemons may wait there to take over.

    The `url` is postgresql://USER@HOST:PORT/DATABASE, or postgresql://USER@/DATABASE?host=FOLDER for the Unix
    socket in a folder. The password is read from a file. Off this machine the connection is by TLS, and the
    server is verified by the authority of `ca_file`, or those that the system trusts.
    """

    url: Annotated[str, AfterValidator(_postgresql)]
    password_file: Path | None = None
    ca_file: Path | None = None

    def server(self, instance: str) -> Server:
        """What the journal of an instance needs, with the files read."""
        url = urlsplit(self.url)
        host = dict(parse_qsl(url.query)).get("host") or url.hostname or ""
        local = host.startswith("/") or is_loopback(host)
        return Server(
            host,
            url.port or 5432,
            unquote(url.path[1:]),
            unquote(url.username or ""),
            f"barcast_{instance}",
            _password("journal", self.password_file),
            None if local and self.ca_file is None else _trust("journal", self.ca_file),
        )


class Model(_Section):
    """Which model serves and how it is sampled. Without sampler and steps the model's own are used.

    `name` is `champion`, a baseline such as `fhs`, a model id or a checkpoint directory; `first` is who
    serves as long as there is no champion. `touch` are pairs of barriers, how far up and how far down in
    standard deviations of the forecast over the longest horizon, that signals tell of.
    """

    name: Annotated[str, AfterValidator(_model)] = "champion"
    first: Annotated[str, AfterValidator(_model)] = "fhs"
    sampler: Annotated[str, AfterValidator(_sampler)] | None = None
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    touch: Annotated[
        list[tuple[float, float]], BeforeValidator(_written_as_pairs), AfterValidator(_pairs)
    ] = []

    @field_validator("steps")
    @classmethod
    def _can_be_sampled(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if steps is not None and "sampler" in info.data:
            _sampler(info.data["sampler"] or SAMPLER, steps)
        return steps


class StrategyTable(_Section):
    """One strategy: its kind, the name it has in topics and reports, its parameters.

    `settings` are those of the path, with the digest of a file as it was when the configuration was read.
    """

    kind: str
    name: Segment | None = None
    params: dict[str, float | int | str | bool] = {}
    _settings: StrategySettings = PrivateAttr()

    @property
    def settings(self) -> StrategySettings:
        """As they are journalled."""
        return self._settings

    @model_validator(mode="after")
    def _builds(self) -> "StrategyTable":
        try:
            self._settings = StrategySettings.of(self.kind, self.name, self.params)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class DriftBands(_Section):
    """How far the champion may be from what it promised.

    `coverage` is that of the share of outcomes inside an interval from its nominal one, `crps` the share by
    which the CRPS may be above the one in its verdict.
    """

    coverage: float = Field(default=0.05, gt=0, lt=1)
    crps: float = Field(default=0.1, gt=0, allow_inf_nan=False)


class Retrain(_Section):
    """When a challenger is trained, and what it must achieve. Cron fields are in UTC.

    Five fields are minute, hour, day, month, weekday; six begin with the second. Without it, trainings are
    asked for by an operator, by `max_age`, the age of the champion, or by `drift`. `margin` is the share by
    which the challenger's CRPS must be below the champion's, as long as that is not older than `max_age`. A
    training is killed after `timeout`, and when it says nothing for as long as `stall`. With a `socket`, a
    worker that listens there trains, else a child of the daemon.
    """

    cron: Annotated[str, AfterValidator(_cron)] | None = None
    max_age: Duration | None = None
    drift: DriftBands | None = None
    steps: int | None = Field(default=None, ge=1)
    margin: float = Field(default=MARGIN, ge=0, lt=1)
    timeout: Duration = 3600 * 10**9
    stall: Duration = 600 * 10**9
    nice: int = Field(default=10, ge=0, le=19)
    socket: Path | None = None


class Verify(_Section):
    """When the end of the journal is computed again and compared: `since` ago and later; cron is in UTC."""

    cron: Annotated[str, AfterValidator(_cron)]
    since: Duration = _UNITS["d"]


class Http(_Section):
    """Where the page, metrics and health are served. Who reaches it may read them: there is no login.

    Orders it takes of those who know the token in `token_file`; without one it takes none. It is served on
    this machine alone then, as it would go in the clear. `reports` is a folder of backtests, each a folder.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(gt=0, lt=65536)
    token_file: Path | None = None
    reports: Path | None = None

    @field_validator("token_file")
    @classmethod
    def _stays_here(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        host = info.data.get("host", "localhost")
        if file is not None and not is_loopback(host):
            raise ValueError(
                f"the token would go to {host} in the clear; leave http.host on this machine, and let a "
                "proxy with TLS pass on what comes from elsewhere"
            )
        return file

    def check(self) -> None:
        """Raise ConfigError for a token that is none, and for a folder that is none."""
        self.token()
        if self.reports is not None and not _is_dir(self.reports):
            raise ConfigError(f"http.reports: {self.reports} is no folder; create it or drop the key")

    def token(self) -> str | None:
        """The token in the file. Raise ConfigError for one that could be guessed."""
        token = _secret("http.token_file", "token", self.token_file)
        if token is not None and not (len(token) >= LEAST_TOKEN and token.isascii() and token.isprintable()):
            raise ConfigError(
                f"http.token_file: {self.token_file} holds no {LEAST_TOKEN} printable ASCII characters or "
                f"more; write one with `openssl rand -hex {LEAST_TOKEN}`"
            )
        return token


class Rehearsal(_Section):
    """A clock of its own, for feeding old bars as if they came now.

    The instance's clock stands at `start` until the real moment `at`, and from then on it runs `speed` times
    as fast as real time.
    """

    start: Zoned
    at: Zoned
    speed: float = Field(gt=0, allow_inf_nan=False)


class Config(BaseSettings):
    """One instance: one root topic, one base timeframe, one state directory."""

    # Defaults are written as they are used, not as they would be in the file.
    model_config = SettingsConfigDict(extra="forbid", frozen=True, validate_default=False)

    version: Literal[1] = 1
    instance: Segment
    state_dir: Path
    timeframe: Annotated[str, AfterValidator(_timeframe)]
    calendar: str = Field(default="24x7", validate_default=True)
    calendars: dict[str, list[Symbol]] = {}
    symbols: list[Symbol] = []
    max_wait: Duration = 2 * 10**9
    max_jump: float = Field(default=MAX_JUMP, gt=0, allow_inf_nan=False)
    keep: Duration = 90 * _UNITS["d"]
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    journal: JournalServer | None = None
    mqtt: Mqtt = Mqtt()
    model: Model = Model()
    strategy: list[StrategyTable] = []
    retrain: Retrain | None = None
    verify: Verify | None = None
    http: Http | None = None
    rehearsal: Rehearsal | None = None
    _file: Path | None = PrivateAttr(None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the file alone: an environment variable with a typing error would be ignored silently."""
        return (init_settings,)

    # Faults that lie between keys are said at the later key, so that they come with all the others.

    @field_validator("calendar")
    @classmethod
    def _has_the_timeframe(cls, calendar: str, info: ValidationInfo) -> str:
        if "timeframe" in info.data:
            try:
                Calendars(calendar, Timeframe.parse(info.data["timeframe"]))
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return calendar

    @field_validator("calendars")
    @classmethod
    def _have_the_timeframe(
        cls, calendars: dict[str, list[str]], info: ValidationInfo
    ) -> dict[str, list[str]]:
        named = [symbol for symbols in calendars.values() for symbol in symbols]
        if twice := sorted({symbol for symbol in named if named.count(symbol) > 1}):
            raise ValueError(f"{', '.join(twice)} is given more than one calendar; name each symbol once")
        if "timeframe" in info.data:
            try:
                for name in calendars:
                    Calendar(name, Timeframe.parse(info.data["timeframe"]))
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return calendars

    @field_validator("journal")
    @classmethod
    def _has_a_schema(cls, journal: JournalServer | None, info: ValidationInfo) -> JournalServer | None:
        if journal and len(info.data.get("instance", "")) > LONGEST_INSTANCE:
            raise ValueError(
                f"the instance's name, part of a schema's, has more than {LONGEST_INSTANCE} characters; "
                "shorten it"
            )
        return journal

    @field_validator("symbols")
    @classmethod
    def _once(cls, symbols: list[str]) -> list[str]:
        if len(set(symbols)) < len(symbols):
            raise ValueError("symbols repeat; name each once")
        return symbols

    @field_validator("strategy")
    @classmethod
    def _named_apart(cls, strategy: list[StrategyTable]) -> list[StrategyTable]:
        names = [s.settings.name for s in strategy]
        if len(set(names)) < len(names):
            raise ValueError(f"strategy names {names} repeat; give each [[strategy]] a name of its own")
        return strategy

    @field_validator("model")
    @classmethod
    def _has_such_bars(cls, model: Model, info: ValidationInfo) -> Model:
        for name in {model.name, model.first} & BASELINES.keys():
            if "timeframe" in info.data:
                try:
                    asked = bool(model.touch) and name == model.name
                    open_model(name, info.data["timeframe"], None, None, asked)
                except ConfigError as error:
                    raise ValueError(str(error)) from error
        return model

    @field_validator("retrain")
    @classmethod
    def _can_change_the_model(cls, retrain: Retrain | None, info: ValidationInfo) -> Retrain | None:
        model = info.data.get("model")
        if retrain and model and model.name != "champion":
            raise ValueError(
                f"model.name = {model.name!r} pins the model, so [retrain] could never change it; "
                'take name = "champion" and put the model into `first`, or drop [retrain]'
            )
        return retrain

    def strategies(self) -> tuple[StrategySettings, ...]:
        """The strategies of the path; one without a name is called after its kind, or its class in a file."""
        return tuple(table.settings for table in self.strategy)

    def bar_calendars(self) -> Calendars:
        """The bar closes of this instance's symbols."""
        return self.settings().bar_calendars()

    def settings(self) -> Settings:
        """What the path needs, as it is journalled."""
        return Settings(
            root=self.mqtt.root,
            timeframe=self.timeframe,
            calendar=self.calendar,
            calendars={symbol: name for name, symbols in self.calendars.items() for symbol in symbols},
            symbols=tuple(self.symbols),
            max_wait=self.max_wait,
            max_jump=self.max_jump,
            sampler=self.model.sampler,
            steps=self.model.steps,
            touch=tuple(self.model.touch),
            strategies=self.strategies(),
        )

    def reread(self) -> tuple["Config", list[str]]:
        """What its file says now, and the keys that it has otherwise.

        Raise ConfigError that names all faults of it, or the keys that cannot change without a restart.
        """
        if self._file is None:
            raise ConfigError("the configuration is from no file, so it cannot be read again; restart")
        config = load(self._file)
        fixed, changed = self.changed_in(config)
        if fixed:
            raise ConfigError(
                f"{', '.join(fixed)}: cannot change while the daemon runs, so nothing was changed; "
                "restart it, or write what was there"
            )
        return config, changed

    def changed_in(self, other: "Config") -> tuple[list[str], list[str]]:
        """Which keys another configuration has otherwise: those that need a restart, and the rest."""
        keys = [key for name in type(self).model_fields for key in self._apart(other, name)]
        return [key for key in keys if key not in RELOADED], [key for key in keys if key in RELOADED]

    def _apart(self, other: "Config", name: str) -> list[str]:
        """A key if another configuration has it otherwise; of a table that both have, its own keys."""
        mine, its = getattr(self, name), getattr(other, name)
        if mine == its:
            return []
        if name in RELOADED or mine is None or its is None or not isinstance(mine, _Section):
            return [name]
        return [f"{name}.{key}" for key in type(mine).model_fields if getattr(mine, key) != getattr(its, key)]

    @property
    def in_force(self) -> Path:
        """The file by which a running daemon tells its children what it goes by."""
        return self.state_dir / ".configuration.json"

    def text(self) -> str:
        """All but the strategies, which no child builds, as JSON that `load` reads."""
        return self.model_dump_json(exclude={"strategy"}, exclude_none=True)

    @property
    def journal_place(self) -> Place:
        """Where the journal is. Raise ConfigError for a file with a password or certificate that is none."""
        return self.journal.server(self.instance) if self.journal else self.state_dir / "journal.db"

    @property
    def topics(self) -> "Topics":
        """The instance's own topics."""
        return Topics(self.mqtt.root, self.instance)


class Topics:
    """Topics of an instance. Orders come on `control` and a verb; answers go below `answers`."""

    def __init__(self, root: str, instance: str) -> None:
        self.instance = instance
        self.bars = f"{root}/bars/#"
        self.adjustments = f"{root}/adjustments/+"
        self.status = f"{root}/status/{instance}"
        self.models = f"{root}/models/{instance}"
        self.deadletter = f"{root}/deadletter/{instance}"
        self.control = f"{root}/control/{instance}/"
        self.answers = f"{root}/answers/"


def cron_schedule(expression: str, steps: int | None) -> Retrain:
    """A schedule by cron alone. Raise ConfigError for an expression that is none."""
    try:
        return Retrain(cron=expression, steps=steps)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults("retrain", error))) from error


def state_dir(path: Path) -> Path:
    """The state directory of a file in which all else may be wrong. Raise ConfigError where it names none."""
    named = _read(path).get("state_dir")
    if not isinstance(named, str) or "\0" in named:
        raise ConfigError(f"{path}: state_dir: {_shown(named)} is no path; name the daemon's directory")
    return path.absolute().parent / named


def _read(path: Path) -> dict[str, Any]:
    """The values of the file as they are. Raise ConfigError where it holds none."""
    if not _is_file(path):
        raise ConfigError(f"{path}: no such file; name the TOML file of an instance")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ConfigError(
            f"{path}: has {size} bytes, and no configuration has more than {MOST_BYTES}; name the TOML file"
        )
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); let this user read it, or ask as the daemon's"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}; correct what stands there") from error
    try:
        if deep := _DEEP.search(text):
            raise ValueError(f"a key of 64 parts or more, {_shown(deep[0])}")
        values: object = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no table of keys")
        return values
    except (ValueError, RecursionError) as error:  # also a number of 5000 digits, and lists nested as deep
        raise ConfigError(f"{path}: not valid TOML: {error}; correct what stands there") from error


def load(path: Path) -> Config:
    """Read the file; paths in it are relative to its folder. Raise ConfigError that names all faults.

    A file that ends in .json is what a daemon wrote for its children, see `Config.text`.
    """
    values, base = _read(path), path.absolute().parent
    if isinstance(values.get("state_dir"), str):
        values["state_dir"] = base / values["state_dir"]
    for table in (values.get("mqtt"), values.get("journal")):
        for key in ("password_file", "ca_file"):
            if isinstance(table, dict) and isinstance(table.get(key), str):
                table[key] = base / table[key]
    for section, key in (("retrain", "socket"), ("http", "token_file"), ("http", "reports")):
        table = values.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = base / table[key]
    strategies = values.get("strategy")
    for table in strategies if isinstance(strategies, list) else ():
        if isinstance(table, dict) and isinstance(kind := table.get("kind"), str) and PATH.fullmatch(kind):
            table["kind"] = str(base / kind)
    model = values.get("model")
    if isinstance(model, dict):
        for key in ("name", "first"):
            name = model.get(key)
            if isinstance(name, str) and name not in ("champion", *BASELINES) and _is_dir(base / name):
                model[key] = str(base / name)
    config = parse(values, str(path))
    config._file = path.absolute()
    return config


def parse(values: dict[str, Any], where: str) -> Config:
    """Settings from plain values. Raise ConfigError that names `where` they are from and every fault."""
    # The library takes such words for orders to itself: it would read other files, or the command line.
    if orders := [name for name in values if name.startswith("_")]:
        raise ConfigError(f"{where}: {_shown(orders[0])}: unknown key{_suggestion((orders[0],))}")
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(where, error))) from error


def _faults(path: str, error: ValidationError) -> Iterator[str]:
    for number, fault in enumerate(error.errors(include_url=False, include_context=False)):
        if number == FAULTS:
            yield f"{path}: and {error.error_count() - FAULTS} faults more; correct these first"
            return
        where = ".".join(_cut(str(part)) for part in fault["loc"]) or "the file"
        if fault["type"] == "extra_forbidden":
            yield f"{path}: {where}: unknown key{_suggestion(fault['loc'])}"
        elif fault["type"] == "missing":
            yield f"{path}: {where}: missing; write it, as it has no default"
        else:
            shown = fault["loc"] and fault["loc"] not in _SECRET
            given = f" (given: {_shown(fault['input'])})" if shown else ""
            said = _cut(fault["msg"].removeprefix("Value error, "), 5 * SHOWN)
            yield f"{path}: {where}: {said}{_form(fault['type'], where)}{given}"


def _form(fault: str, where: str) -> str:
    """How a table or a list is written, for who wrote neither."""
    table = "[[strategy]]" if where.startswith("strategy") else f"[{where}]"
    if fault == "model_type" or (fault, table) == ("list_type", "[[strategy]]"):
        return f"; write {table} and its keys in the lines below"
    return '; write it in brackets, such as ["AAPL", "IBM"]' if fault == "list_type" else ""


def _shown(value: object) -> str:
    """A value of the file, cut; one that cannot be written out is named by what it is."""
    try:
        return _cut(repr(str(value) if isinstance(value, Path) else value))
    except (ValueError, RecursionError):  # a number of 5000 digits, tables as deep
        return f"a {type(value).__name__} too large to be shown"


def _cut(text: str, length: int = SHOWN) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _suggestion(loc: tuple[int | str, ...]) -> str:
    fields: Any = Config.model_fields
    for part in loc[:-1]:
        if isinstance(part, str) and part in fields:
            inner = [t for t in _models(fields[part].annotation) if issubclass(t, BaseModel)]
            fields = inner[0].model_fields if inner else {}
    close = difflib.get_close_matches(str(loc[-1]), list(fields), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(fields)}"


def _models(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models(part)
