"""`python echobot.py` as a process: start it, kill it, read what it logs."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from support.homeserver import PASSWORD

ECHOBOT = Path(__file__).parents[2] / "echobot.py"
SETTINGS = ("MATRIX_", "STATE_DIRECTORY", "LOG_LEVEL", "NOTIFY_SOCKET", "WATCHDOG_", "JOURNAL_")


async def eventually(
    condition: Callable[[], Awaitable[object]], seconds: float = 60, what: str = "the condition"
) -> None:
    """Wait until the condition holds; raise AssertionError if it does not within so many s."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        await asyncio.sleep(0.05)


def fork(directory: Path, reply_to: str = "", **constants: object) -> Path:
    """Return a copy of echobot.py with another reply_to and other values for some constants."""
    source = ECHOBOT.read_text()
    lines = source.splitlines()
    # From the last to the first, so that line numbers stay right.
    for node in reversed(ast.parse(source).body):
        new = None
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "reply_to" and reply_to:
            new = reply_to
        elif isinstance(node, ast.Assign) and isinstance(name := node.targets[0], ast.Name):
            value = constants.pop(name.id, None)
            new = f"{name.id} = {value!r}" if value is not None else None
        if new is not None:
            lines[node.lineno - 1 : node.end_lineno] = new.splitlines()
    assert not constants, f"echobot.py has no {constants}"
    path = directory / "fork.py"
    path.write_text("\n".join(lines) + "\n")
    return path


class Bot:
    """A bot and its state directory; between `start` and its end there is a process."""

    def __init__(self, homeserver_url: str, directory: Path, **environment: str) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.state.mkdir(exist_ok=True)
        self.python = Path(sys.executable)
        self.script = ECHOBOT
        self.environment = {
            "MATRIX_HOMESERVER": homeserver_url,
            "MATRIX_USER": "@bot:echobot.test",
            "MATRIX_PASSWORD": PASSWORD,
            "STATE_DIRECTORY": str(self.state),
            **environment,
        }
        self.process: asyncio.subprocess.Process | None = None
        self.log_path = directory / "bot.log"

    async def start(self, *arguments: str, **options: object) -> Bot:
        """Start the process; `options` go to `create_subprocess_exec`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
        with self.log_path.open("a") as log:
            self.process = await asyncio.create_subprocess_exec(
                str(self.python),
                str(self.script),
                *arguments,
                env={**inherited, **self.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **options,  # type: ignore[arg-type]
            )
        return self

    async def run(self) -> None:
        """Start the process for the first time, and wait until it takes commands."""
        await self.start()
        await self.ready()

    @property
    def running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self.process is not None and self.process.returncode is None

    async def send_signal(self, number: int, seconds: float = 15) -> int:
        """Send a signal, wait for the end of the process, return its exit status."""
        assert self.process is not None
        assert self.running, f"the bot ended by itself: {self.log}"
        self.process.send_signal(number)
        return await self.wait(seconds)

    async def kill(self) -> None:
        """End the process as a power cut would."""
        await self.send_signal(signal.SIGKILL)

    async def stop(self) -> int:
        """End the process in order, return its exit status."""
        return await self.send_signal(signal.SIGTERM)

    async def wait(self, seconds: float = 15) -> int:
        """Wait for the process to end by itself, return its exit status."""
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), seconds)

    @property
    def log(self) -> str:
        """All that its processes have written to stdout and stderr."""
        return self.log_path.read_text()

    async def logs(self, text: str, times: int = 1, seconds: float = 30) -> None:
        """Wait until it has logged a text so many times."""

        async def logged() -> bool:
            return self.log.count(text) >= times

        await eventually(logged, seconds, f"{text!r} in the log: {self.log}")

    async def ready(self, times: int = 1) -> None:
        """Wait until it has logged in so many times and saved its first position."""
        await self.logs("Logged in as", times)

        async def saved() -> bool:
            return (self.state / "next_batch").exists()

        await eventually(saved, what="a saved next_batch")

    @property
    def session(self) -> dict[str, str]:
        """What session.json holds."""
        session: dict[str, str] = json.loads((self.state / "session.json").read_text())
        return session


@asynccontextmanager
async def new_bot(homeserver_url: str, **environment: str) -> AsyncIterator[Bot]:
    """Make a bot with an empty state directory; kill it and remove the directory at the end."""
    with TemporaryDirectory(prefix="echobot-") as directory:
        bot = Bot(homeserver_url, Path(directory), **environment)
        try:
            yield bot
        finally:
            if bot.running:
                await bot.kill()
