"""Trainings in another service: a request on a socket, run as a child; its words as they come, its result.

Requests and answers are JSON, one a line. The client sends `{"verb": "train", "arguments": [...]}`; the
worker answers `{"line": ...}` for each line of the child's standard error, and at last
`{"exit": ..., "stdout": ...}`, or `{"refused": ...}` alone. The child lives as long as the connection.
"""

import asyncio
import os
import signal
import socket
import struct
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import structlog

LINE_BYTES = 2**20
"""Longest line of a request or an answer."""
REQUEST_SECONDS = 10.0
"""How long whoever connects may take to say what it wants."""
CHUNK = 65536
LINE_KEPT = 2000
"""Characters of a child's line that are handed on."""
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

log = structlog.get_logger()


class Wish(Protocol):
    """What is sent to a socket: JSON on one line, with a verb."""

    @property
    def verb(self) -> str:
        """What is to be done."""
        ...


W = TypeVar("W", bound=Wish)


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be run: one of the worker's verbs, and what is added to its command."""

    verb: str
    arguments: list[str]


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the child, its result, or why there is none: one of the three is set."""

    line: str | None = None
    exit: int | None = None
    stdout: str = ""
    refused: str | None = None


def work(listener: socket.socket, commands: Mapping[str, Sequence[str]]) -> None:
    """Take one connection from a listening Unix socket and do what it asks for.

    `commands` maps each verb to the argument list that begins its command. Whoever connects must be this user
    or root. The child is killed with all that it started when the connection closes.
    """
    asyncio.run(_work(listener, commands))


async def call(
    path: Path, verb: str, arguments: Sequence[str], on_line: Callable[[str], None]
) -> tuple[int, bytes]:
    """Have a worker run a verb; return the child's exit status, negative for a signal, and its output.

    `on_line` gets each line of its standard error as it comes. A cancelled call kills the child. Raise
    OSError when no worker listens at `path`, when it refuses, and when it ends before its child.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=LINE_BYTES)
    except OSError as error:
        raise ConnectionError(
            f"{path}: no worker listens there ({error.strerror}); start barcast-retrain@NAME.socket, or "
            "correct the key `socket` of [retrain]"
        ) from error
    try:
        send(writer, Request(verb, list(arguments)))
        await writer.drain()
        while said := await reader.readline():
            answer = msgspec.json.decode(said, type=Answer)
            if answer.refused is not None:
                raise PermissionError(f"{path}: the worker refuses: {answer.refused}")
            if answer.exit is not None:
                return answer.exit, answer.stdout.encode()
            on_line(answer.line or "")
        raise ConnectionError(f"{path}: the worker ended before its child; its log says why")
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def _work(listener: socket.socket, commands: Mapping[str, Sequence[str]]) -> None:
    listener.setblocking(False)
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    uid = user_of(connection)
    reader, writer = await asyncio.open_unix_connection(sock=connection, limit=LINE_BYTES)
    try:
        try:
            example = f'{{"verb": "{next(iter(commands))}", "arguments": []}}'
            request = await receive(reader, Request, commands, example)
            if uid not in (0, os.getuid()):
                raise PermissionError(
                    f"user {uid} may not ask for anything here; ask as {os.getuid()} or as root"
                )
        except (PermissionError, ValueError) as refusal:
            log.warning("refused", reason=str(refusal))
            send(writer, Answer(refused=str(refusal)))
            await writer.drain()
            return
        log.info("asked", verb=request.verb, arguments=request.arguments)
        await _run([*commands[request.verb], *request.arguments], reader, writer)
    except ConnectionError:
        log.warning("abandoned", reason="whoever asked is gone")
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def user_of(connection: socket.socket) -> int:
    """The user id of the process at the other end of a Unix socket, as the kernel says."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(found)[1])


async def receive(reader: asyncio.StreamReader, kind: type[W], verbs: Collection[str], example: str) -> W:
    """Read one line with a verb.

    Raise ValueError that says what is wrong with it, and ConnectionError where nothing comes.
    """
    wanted = f"send one line such as {example}"
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            said = await reader.readline()
    except (TimeoutError, ValueError) as error:
        raise ValueError(
            f"no line within {REQUEST_SECONDS:.0f} s and {LINE_BYTES} bytes; {wanted}"
        ) from error
    if not said:
        raise ConnectionResetError
    try:
        wish = msgspec.json.decode(said, type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{error}; {wanted}") from error
    if wish.verb not in verbs:
        raise ValueError(f"verb {wish.verb!r} is none of {', '.join(verbs)}; {wanted}")
    return wish


async def _run(command: Sequence[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Run a child to its end. Raise ConnectionError when whoever asked goes first; the child is dead then."""
    child = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True
    )
    assert child.stdout is not None
    assert child.stderr is not None
    telling = asyncio.create_task(_tell(child.stderr, child.stdout, writer), name="telling")
    leaving = asyncio.create_task(reader.read(1), name="leaving")
    try:
        await asyncio.wait([telling, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not telling.done():
            raise ConnectionResetError
        out = telling.result()
        send(writer, Answer(exit=await child.wait(), stdout=out.decode("utf-8", "replace")))
        await writer.drain()
    finally:
        for task in (telling, leaving):
            task.cancel()
        with suppress(ProcessLookupError):  # what it started may outlive it
            os.killpg(child.pid, signal.SIGKILL)
        log.info("ended", exit_status=await child.wait())


async def _tell(err: asyncio.StreamReader, out: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Pass the child's lines on, to the log as well; return what it wrote to its standard output."""
    printed = asyncio.create_task(out.read(), name="printed")
    try:
        async for line in lines(err):
            log.info("said", line=line)
            send(writer, Answer(line=line))
            await writer.drain()
        return await printed
    finally:
        printed.cancel()


async def lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a child, however long they are, each to its first `LINE_KEPT` characters."""
    rest = b""
    while chunk := await stream.read(CHUNK):
        *whole, rest = (rest + chunk).split(b"\n")
        rest = rest[:CHUNK]
        for line in whole:
            yield line[:LINE_KEPT].decode("utf-8", "replace").rstrip()
    if rest:
        yield rest[:LINE_KEPT].decode("utf-8", "replace").rstrip()


def send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    """Write a message as one line."""
    writer.write(msgspec.json.encode(message) + b"\n")
