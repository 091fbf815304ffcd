"""Orders to a running daemon: a Unix socket in its state directory, one JSON object a line.

A client sends one `Order`. It is answered with `{"line": ...}` any number of times, and at last with
`{"done": ...}` or `{"refused": ...}`.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import structlog

from barcast.daemon.panel import TrainingSettings
from barcast.daemon.retraining import tried
from barcast.daemon.worker import LINE_BYTES, receive, send, user_of
from barcast.models import BarcastError, ConfigError

NAME = "control"
VERBS = ("state", "retrain", "stop", "reload", "pause", "resume", "rollback")
"""What an operator may order."""
MOST_TEXT = 500
"""Characters of a reason or a model's name, at most."""
UNREAD_BYTES = 1_000_000
"""A client that leaves more lines unread is let go."""

log = structlog.get_logger()


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is wanted: one of `VERBS`; `retrain` and `reload` with `wait` to the end of it, `retrain` by the
    settings of a `training`, `rollback` `to` a model; and the `reason`, for the journal.
    """

    verb: str
    wait: bool = False
    to: str | None = None
    reason: str | None = None
    training: TrainingSettings | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for what would be ignored."""
        if self.wait and self.verb not in ("retrain", "reload"):
            raise ValueError(f"`wait` goes with the verbs retrain and reload, not {self.verb}")
        if self.to is not None and self.verb != "rollback":
            raise ValueError(f"`to` goes with the verb rollback, not {self.verb}")
        if self.training is not None and self.verb != "retrain":
            raise ValueError(f"`training` goes with the verb retrain, not {self.verb}")
        for name, text in (("to", self.to), ("reason", self.reason)):
            if text is not None and len(text) > MOST_TEXT:
                raise ValueError(f"`{name}` has {len(text)} characters, more than {MOST_TEXT}; say less")


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line on the way, the result, or why there is none: one of the three is set."""

    line: str | None = None
    done: str | None = None
    refused: str | None = None


Tell = Callable[[str], None]
TakeOrder = Callable[[Order, str, Tell], Awaitable[Answer]]
"""Carries out an order of somebody and returns the answer; what it tells meanwhile goes to the client."""


async def answered(order: Order, work: Awaitable[str]) -> Answer:
    """What comes of an order: a sentence, or why not. Whatever goes wrong is an answer."""

    async def carried() -> Answer:
        try:
            return Answer(done=await work)
        except (BarcastError, OSError) as error:
            return Answer(refused=str(error))

    answer = await tried(carried(), "order_failed")
    if isinstance(answer, Answer):
        return answer
    fault = f"{type(answer).__name__}: {answer}"
    return Answer(refused=f"{order.verb} failed: {fault}; the daemon's log has more, report it")


@contextmanager
def _reachable(state_dir: Path) -> Iterator[str]:
    """The socket's path, short however long that of the directory is: addresses hold 107 bytes."""
    folder = os.open(state_dir, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{NAME}"
    finally:
        os.close(folder)


async def serve(state_dir: Path, take: TakeOrder) -> None:
    """Take orders until cancelled. Whoever may not write as this user cannot connect.

    No client holds up the end: one that does not read is let go.

    Raise ConfigError for a directory that takes no socket.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        os.fchmod(listener.fileno(), 0o600)  # before bind, so that there is no moment without it
        try:
            with _reachable(state_dir) as address:
                (state_dir / NAME).unlink(missing_ok=True)  # of a daemon that was killed: the lock is ours
                listener.bind(address)
            own = (state_dir / NAME).stat()
        except OSError as error:
            raise ConfigError(f"state_dir: {state_dir} takes no socket ({error}); name another") from error

        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _client(reader, writer, take)

        server = await asyncio.start_unix_server(client, sock=listener, limit=LINE_BYTES)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            with suppress(FileNotFoundError):
                if os.path.samestat(own, (state_dir / NAME).stat()):  # not that of who took over from us
                    (state_dir / NAME).unlink()


async def _client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, take: TakeOrder) -> None:
    who = f"uid {user_of(writer.get_extra_info('socket'))}"

    def tell(line: str) -> None:
        if not writer.is_closing():
            send(writer, Answer(line=line))
            if writer.transport.get_write_buffer_size() > UNREAD_BYTES:
                writer.transport.abort()

    try:
        try:
            send(writer, await _answer(reader, who, take, tell))
            await writer.drain()
        except ConnectionError:
            log.info("control_left")  # what it ordered is done all the same
        finally:
            writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    except asyncio.CancelledError:
        writer.transport.abort()  # which has no more time for what is not read
        raise


async def _answer(reader: asyncio.StreamReader, who: str, take: TakeOrder, tell: Tell) -> Answer:
    try:
        order = await receive(reader, Order, VERBS, '{"verb": "state"}')
    except ValueError as error:
        return Answer(refused=str(error))
    return await take(order, who, tell)


def ask(state_dir: Path, order: Order, on_line: Tell) -> str | None:
    """Give an order and wait for its result; None when no daemon runs on the directory.

    Raise ConfigError when it refuses, or ends before it has answered.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            with _reachable(state_dir) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except PermissionError as error:
            raise ConfigError(
                f"{state_dir / NAME}: {error.strerror}; ask as the user of the daemon"
            ) from error
        connection.sendall(msgspec.json.encode(order) + b"\n")
        with connection.makefile("rb") as lines:
            for line in lines:
                answer = msgspec.json.decode(line, type=Answer)
                if answer.refused is not None:
                    raise ConfigError(answer.refused)
                if answer.done is not None:
                    return answer.done
                on_line(answer.line or "")
    raise ConfigError(f"{state_dir}: the daemon ended before it had answered; its log says why")
