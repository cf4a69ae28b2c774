"""The one command line, of `replicator`, `python -m replicator` and `backfill.py`: the list of commands, exit codes.

A command is a function in one of the other modules; it imports what it needs when it runs, so that `--help` is fast.
`arguments.py` has what several commands take, `app.py` puts the replicator together.
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import platform
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address
from threading import Thread
from typing import Annotated, Any, Literal, TextIO, cast

import typer

from replicator import __version__
from replicator.cli import backfill, dead_letters, inspect, reconcile, stream
from replicator.cli.operate import control, follow, notify, top
from replicator.cli.packages import require_own
from replicator.contracts.closing import blocking_ends
from replicator.contracts.errors import Overtaken, ReplicatorError, SettingsError
from replicator.operations.logs import configure_logging, printable

EPILOG = """\b
first time:  replicator config check  are the settings usable?
             replicator init          makes table, checkpoint and slot
             replicator check         is something missing? with the cure
             replicator               runs until SIGTERM or Ctrl-C
in trouble:  replicator status        where slot, checkpoint and sinks are
             and the same from PostgreSQL's side:
             replicator sql slot-lag | psql "$REPLICATOR_POSTGRES_DSN"

Settings are environment variables: `replicator config show` lists them.

\b
Example: replicator config check && replicator init && replicator check \\
             && replicator
Exit codes: 0 done, 1 failed, 2 unusable arguments or settings."""
DONE = "0 done, 1 failed, 2 unusable arguments or settings"
DIFFERENT = f"{DONE},\n  3 different"
log = logging.getLogger("replicator")

PLAIN: dict[str, Any] = {"context_settings": {"terminal_width": 80}, "rich_markup_mode": None}


def _group(name: str, text: str) -> typer.Typer:
    group = typer.Typer(name=name, help=text, **PLAIN)
    app.add_typer(group)
    return group


def _add(
    group: typer.Typer, name: str, command: Callable[..., Any], example: str, codes: str = DONE, text: str | None = None
) -> None:
    epilog = f"\b\nExample: {example}\nExit codes: {codes}."
    group.command(name, help=text, epilog=epilog, context_settings={"terminal_width": 80})(command)


app = typer.Typer(name="replicator", pretty_exceptions_enable=False, **PLAIN)
_add(app, "run", stream.run, "replicator run")
_add(app, "init", stream.init, "replicator init")
_add(app, "check", inspect.check, "replicator check", f"0 all fine,{DONE.removeprefix('0 done,')}")
_add(
    app, "status", inspect.status, "replicator status --json", f"0 ready,{DONE.removeprefix('0 done,')},\n  3 not ready"
)
_add(app, "pause", control.pause, "replicator pause http --for 30m")
_add(app, "resume", control.resume, "replicator resume http")
_add(app, "retry", control.retry, "replicator retry http")
_add(app, "trace", follow.trace, "replicator trace 301013", f"{DONE},\n  3 missing, refused or different")
_add(app, "tail", follow.tail, "replicator tail --sink http")
_add(app, "peek", follow.peek, "replicator peek 20")
_add(app, "drop-slot", stream.drop_slot, "replicator drop-slot --yes")
_letters = _group("dead-letters", "List, replay or drop what a sink refused for good.")
_add(_letters, "list", dead_letters.show, "replicator dead-letters list --sink http")
_add(_letters, "replay", dead_letters.replay, "replicator dead-letters replay --sink http")
_add(_letters, "drop", dead_letters.drop, "replicator dead-letters drop --id 7 --yes")
_add(app, "backfill", backfill.backfill, "replicator backfill --last 2h", text=backfill.MANUAL)
_add(app, "reconcile", reconcile.reconcile, "replicator reconcile --last 1d --repair", DIFFERENT, reconcile.RECONCILE)
_add(app, "rebuild-redis", reconcile.rebuild_redis, "replicator rebuild-redis", DIFFERENT, reconcile.REBUILD)
_add(app, "sql", inspect.sql, 'replicator sql slot-lag | psql "$REPLICATOR_POSTGRES_DSN"')
_add(app, "top", top.top, "replicator top --url http://10.0.0.7:8080", f"{DONE},\n  3 not ready, without a terminal")
_notify = _group("notify", "Test the messages to REPLICATOR_NOTIFY_URL.")
_add(_notify, "test", notify.test, "replicator notify test")
_config = _group("config", "Show and check the settings.")
_add(_config, "show", inspect.config_show, "replicator config show --json")
_add(_config, "check", inspect.config_check, "replicator config check")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"engagement-replicator {__version__} (Python {platform.python_version()})")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=EPILOG)
def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> Coroutine[Any, Any, int] | None:
    """Replicate the rows of a table, enriched, to ClickHouse, Redis and an HTTP API.

    The table is engagement_events, or one that REPLICATOR_STREAM declares.

    PostgreSQL is told that a position is flushed only after every sink has it and the checkpoint is on disk. Without a
    command it does what `run` does.
    """
    return stream.run() if context.invoked_subcommand is None else None


def main(arguments: Sequence[str] | None = None, program: typer.Typer = app) -> int:
    """Run one command; its exit code."""
    _prepare_streams()
    configure_logging("info", "text")  # until the settings are read
    os.umask(0o077)  # whatever it makes is its own: checkpoint and dead letters, and the embedded ClickHouse's tables
    try:
        with blocking_ends(_end):
            return _main(arguments, program)
    except Exception as exc:
        configure_logging("info", _log_form())
        said = "this has failed in an unexpected way (%s): please report it, with the traceback"
        log.critical(said, type(exc).__name__, exc_info=exc, extra={"code": ReplicatorError.code})
        return 1
    finally:
        logging.shutdown()


def _end() -> None:
    """While the main thread hangs for ever."""
    with suppress(Exception):
        sys.stdout.flush()
    logging.shutdown()
    os._exit(1)


def _main(arguments: Sequence[str] | None, program: typer.Typer) -> int:
    try:
        require_own()
        return _run(sys.argv[1:] if arguments is None else arguments, program)
    except typer.TyperException as exc:
        _complain(_one_line(exc, program))
        return 2
    except Overtaken as exc:
        log.warning("%s", exc)
        logging.shutdown()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  ourselves, as we were called
    except ReplicatorError as exc:
        try:
            sys.stdout.flush()  # what was done before it
        except UnwrittenError:
            _give_up_output()
        _complain(exc)
        return exc.exit_code
    except asyncio.CancelledError:
        _complain("stopped before it was done")
        return 1
    except KeyboardInterrupt:  # of a command without an event loop, or at a question
        return 1
    except UnwrittenError as exc:
        _give_up_output()
        if exc.error.errno != errno.EPIPE:  # `| head` closed it; nothing left to say
            _complain(f"Standard output can't be written: {exc.error.strerror}.")
        return 1


def _complain(failure: ReplicatorError | str) -> None:
    """The last line on standard error, in the log's form."""
    if _log_form() == "json":
        configure_logging("info", "json")
        log.critical("%s", failure)
    else:
        print(f"replicator: {printable(str(failure))}", file=sys.stderr)


def _log_form() -> Literal["text", "json"]:
    from replicator.contracts.settings import given

    with suppress(SettingsError):
        if (form := given("log_format")) and form.text.lower() == "json":
            return "json"
    return "text"


def _prepare_streams() -> None:
    """One that is closed is as /dev/null, and text that a terminal's encoding lacks is escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # never closed, as the others are
            setattr(sys, name, open(null, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stdout, _Output):
        sys.stdout = cast("TextIO", _Output(sys.stdout))


class UnwrittenError(Exception):
    """Standard output can't be written. A destination's OSError never looks like this."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Output:
    """Standard output without control characters, whoever they come from."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(printable(text, keep="\n\t"))
        except OSError as exc:
            raise UnwrittenError(exc) from exc

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as exc:
            raise UnwrittenError(exc) from exc


def _give_up_output() -> None:
    """Else Python tries once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Threads(ThreadPoolExecutor):
    """A daemon thread for each call: asyncio's own are joined at the end, however long a database stays silent."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """Begin the call."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                future.set_result(call(*args, **options))
            except BaseException as exc:  # noqa: BLE001  whoever waits for it gets it
                future.set_exception(exc)

        Thread(target=work, daemon=True).start()
        return future


NEXT_ADDRESS_SECONDS = 0.25
"""As RFC 8305 has it."""


class _Loop(asyncio.SelectorEventLoop):
    """Looks a name up once at a time, however many ask; does not wait for an address that does not answer.

    Where a name server is silent, each try would leave a thread behind for a minute. Where a network drops what is sent
    to one address of a name (IPv6, as a rule), a client's time-out is over before the next address is tried.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_default_executor(_Threads())
        self._look_ups: dict[object, asyncio.Task[Any]] = {}

    async def getaddrinfo(self, *name: Any, **options: Any) -> Any:
        """Wait for the look-up that runs, or begin one; it goes on when nobody waits any more."""
        key = (name, *sorted(options.items()))
        if key not in self._look_ups:
            self._look_ups[key] = self.create_task(super().getaddrinfo(*name, **options))
            self._look_ups[key].add_done_callback(lambda task: self._forget(key, task))
        return await asyncio.shield(self._look_ups[key])

    async def create_connection(self, *arguments: Any, **options: Any) -> Any:
        """Try the next address of a name soon, beside the first."""
        # An address has no next one, and asyncio forgets to close the socket of a race that is cancelled at its end.
        host = arguments[1] if len(arguments) > 1 else options.get("host")
        races = {} if _is_address(host) else {"happy_eyeballs_delay": NEXT_ADDRESS_SECONDS}
        return await super().create_connection(*arguments, **races | options)

    def _forget(self, key: object, task: asyncio.Task[Any]) -> None:
        del self._look_ups[key]
        if not task.cancelled():
            task.exception()  # whoever waited for it has it


def _is_address(host: object) -> bool:
    with suppress(ValueError):
        ip_address(str(host))
        return True
    return False


def _run(arguments: Sequence[str], program: typer.Typer) -> int:
    name = program.info.name
    result = typer.main.get_command(program).main(list(arguments), prog_name=name, standalone_mode=False)
    if isinstance(result, Coroutine):  # a command that works on the event loop
        with asyncio.Runner(loop_factory=_Loop) as runner:
            result = runner.run(_stoppable(result))
    sys.stdout.flush()
    return int(result or 0)


async def _stoppable(work: Coroutine[Any, Any, int]) -> int:
    """A signal ends what has no better way to stop, process 1 of a container included."""
    if task := asyncio.current_task():
        stream.stop_on_signals(task.cancel)
    return await work


def _one_line(error: Any, program: typer.Typer) -> str:
    """What the parser found wrong: the argument, the problem, what the argument takes."""
    context = getattr(error, "ctx", None)
    command: Any = context.command if context else typer.main.get_command(program)
    name = getattr(error, "option_name", None)
    option = getattr(error, "param", None) or next((known for known in _options(command) if name in known.opts), None)
    message = error.message.removeprefix("Value error, ").rstrip(".")
    if option is not None and not getattr(option, "is_flag", False):
        name = option.opts[0] if option.opts[0].startswith("-") else option.metavar
        return str(SettingsError(name=name, problem=message or "it is missing", expected=option.help or "a value"))
    if close := getattr(error, "possibilities", None):
        message += f". Did you mean {' or '.join(close)}?"
    elif message == "Missing command":
        message += f", one of {', '.join(command.commands)}"
    return f"{message.rstrip('.')}{'' if message.endswith('?') else '.'} See {_path(context)} --help"


def _path(context: Any) -> str:
    return context.command_path if context else "replicator"


def _options(command: Any) -> Iterator[Any]:
    """Of a command and those under it: an error of the parser does not say which command it was."""
    yield from command.params
    for sub in getattr(command, "commands", {}).values():
        yield from _options(sub)
