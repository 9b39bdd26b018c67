"""`python echobot.py` as a process: start it, kill it, read what it logs."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from inspect import isawaitable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from support.homeserver import PASSWORD
from support.prefork import Forked, Parent

ECHOBOT = Path(__file__).parents[2] / "echobot.py"
SETTINGS = ("MATRIX_", "STATE_DIRECTORY", "LOG_LEVEL", "NOTIFY_SOCKET", "WATCHDOG_", "JOURNAL_")


async def eventually(
    condition: Callable[[], object], seconds: float = 60, what: str = "the condition"
) -> None:
    """Wait until the condition, plain or async, holds; raise AssertionError if not within s."""
    started = time.monotonic()
    while not (await held if isawaitable(held := condition()) else held):
        waited = time.monotonic() - started
        assert waited < seconds, f"{what} did not come true within {seconds} s"
        # The longer it takes, the less its end is rushed to: asking costs the homeserver work.
        await asyncio.sleep(min(0.02 + waited / 10, 0.5))


async def together(*checks: Coroutine[Any, Any, object]) -> None:
    """Run checks side by side, as those that wait more than they work may; all must hold."""
    async with asyncio.TaskGroup() as tasks:
        for check in checks:
            tasks.create_task(check)


def fork(directory: Path, reply_to: str) -> Path:
    """Return a copy of echobot.py with another reply_to, as people make who want another bot."""
    source = ECHOBOT.read_text()
    old = source[source.index("async def reply_to") : source.index("async def main")]
    path = directory / "fork.py"
    path.write_text(source.replace(old, f"{reply_to.strip()}\n\n\n"))
    return path


# The process's clock runs this many times as fast. All of asyncio, and what is built on it, takes
# its time from these two: sleeps, timeouts, aiohttp's deadlines.
FAST_CLOCK = """
import selectors, sys, time
def speed_up(speed, monotonic=time.monotonic, select=selectors.DefaultSelector.select):
    began = monotonic()
    fast = lambda: began + (monotonic() - began) * speed
    for module in list(sys.modules.values()):
        for name in [n for n, value in vars(module).items() if value is monotonic]:
            setattr(module, name, fast)
    selectors.DefaultSelector.select = lambda self, timeout=None: select(
        self, timeout and timeout / speed
    )
speed_up({speed})
"""


class Bot:
    """A bot and its state directory; between `start` and its end there is a process.

    Unless there is something special about it, it is forked off one that has imported nio.

    `speed`: how many times as fast its clock runs, so that a test need not wait a minute for what
    takes the bot a minute. The homeserver's clock is the real one: a request of 10 ms seems to take
    0.2 s at a speed of 20, and the Proxy in between has to shorten the polls by the same factor.
    `customize`: code that the process runs before anything else.
    """

    def __init__(
        self, homeserver_url: str, directory: Path, speed: float = 1, **environment: str
    ) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.state.mkdir(exist_ok=True)
        self.may_be_forked = True  # else it takes as long to start as it does for people
        self.python = Path(sys.executable)
        self.script = ECHOBOT
        self.environment = {
            "MATRIX_HOMESERVER": homeserver_url,
            "MATRIX_USER": "@bot:echobot.test",
            "MATRIX_PASSWORD": PASSWORD,
            "STATE_DIRECTORY": str(self.state),
            **environment,
        }
        self.speed = speed
        self.customize = ""
        self.process: asyncio.subprocess.Process | Forked | None = None
        self.log_path = directory / "bot.log"

    async def start(self, *arguments: str, **options: object) -> Self:
        """Start the process; `options` go to `create_subprocess_exec`, before those used here."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(SETTINGS) and not name.lower().endswith("_proxy")
        }
        first = FAST_CLOCK.format(speed=self.speed) if self.speed != 1 else ""
        first += self.customize
        is_usual = self.python == Path(sys.executable) and not arguments and not options
        is_usual &= self.may_be_forked
        # Others, as SSL_CERT_FILE, may be for what is imported.
        names = [name for name in self.environment if not name.lower().endswith("_proxy")]
        is_usual &= all(name.startswith(SETTINGS) for name in names)
        with self.log_path.open("a") as log:
            if is_usual and Parent.running:
                environment = {**inherited, **self.environment}
                self.process = await Parent.running.start(
                    self.script, environment, log.fileno(), first
                )
                return self
            (self.directory / "sitecustomize.py").write_text(first)
            self.process = await asyncio.create_subprocess_exec(
                str(self.python),
                str(self.script),
                *arguments,
                env={**inherited, "PYTHONPATH": str(self.directory), **self.environment},
                **{"stdin": asyncio.subprocess.DEVNULL, "stdout": log, "stderr": log, **options},  # type: ignore[arg-type]
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

    async def send_signal(self, number: int, seconds: float = 60) -> int:
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

    async def wait(self, seconds: float = 60) -> int:
        """Wait for the process to end by itself, return its exit status."""
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), seconds)

    async def refused(self, seconds: float = 60) -> tuple[int, str]:
        """Wait for it to end by itself; return its exit status and the one line that says why."""
        status = await self.wait(seconds)
        (line,) = [line for line in self.log.splitlines() if line.startswith("echobot: ")]
        assert self.log.endswith(f"{line}\n")
        assert "Traceback" not in self.log
        return status, line

    @property
    def log(self) -> str:
        """All that its processes have written to stdout and stderr."""
        return self.log_path.read_text()

    async def logs(self, text: str, times: int = 1, seconds: float = 30) -> None:
        """Wait until it has logged a text so many times."""
        try:
            await eventually(lambda: self.log.count(text) >= times, seconds)
        except AssertionError:
            raise AssertionError(f"{text!r} is not {times} times in the log: {self.log}") from None

    async def ready(self, times: int = 1) -> None:
        """Wait until it has logged in so many times and saved its first position."""
        await self.logs("Logged in as", times)
        await self.saves()

    @property
    def saved(self) -> list[str]:
        """The lines of the file next_batch: the position, and each room that owes replies."""
        path = self.state / "next_batch"
        return path.read_text(errors="replace").split("\n") if path.exists() else [""]

    @property
    def next_batch(self) -> str:
        """The saved position, empty if there is none."""
        return self.saved[0]

    @property
    def unfinished(self) -> dict[str, str]:
        """The rooms that still owe replies, each with the position from which it is to be read."""
        return {
            room: since
            for room, _, since in (line.partition(" ") for line in self.saved[1:] if line)
        }

    async def saves(self, other_than: str = "", seconds: float = 60) -> None:
        """Wait until it has saved a position, another one than this."""
        what = f"another next_batch than {other_than!r}"
        await eventually(lambda: self.next_batch not in ("", other_than), seconds, what)

    @property
    def session(self) -> dict[str, str]:
        """What session.json holds."""
        session: dict[str, str] = json.loads((self.state / "session.json").read_text())
        return session


@asynccontextmanager
async def new_bot(homeserver_url: str, speed: float = 1, **environment: str) -> AsyncIterator[Bot]:
    """Make a bot with an empty state directory; kill it and remove the directory at the end."""
    with TemporaryDirectory(prefix="echobot-") as directory:
        bot = Bot(homeserver_url, Path(directory), speed, **environment)
        try:
            yield bot
        finally:
            if bot.running:
                await bot.kill()
