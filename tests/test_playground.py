"""The playground answers in a pipe and in a terminal, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.bot import eventually

PLAYGROUND = Path(__file__).with_name("playground.py")


def processes_with(variable: str) -> list[str]:
    """Return the command lines of the processes that have a variable in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # It has just ended, or is somebody else's.
    return found


def assert_nothing_left(directory: Path) -> None:
    """Assert that no process and no file of a playground with that TMPDIR is there."""
    assert processes_with(f"TMPDIR={directory}") == []
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "answers"),
    [
        ("!replybot one\nno command\n\n!replybot two\nno newline at the end", "one\ntwo\n"),
        ("", ""),
    ],
)
async def test_pipe_gets_the_answers_and_status_0(tmp_path: Path, typed: str, answers: str) -> None:
    """The answers are on stdout, also when the last line gets none, and nothing is left behind."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        PLAYGROUND,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, progress = await asyncio.wait_for(process.communicate(typed.encode()), 60)
    assert output.decode() == answers
    assert process.returncode == 0, progress.decode()
    assert_nothing_left(tmp_path)


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, descriptor: int, process: asyncio.subprocess.Process) -> None:
        self.descriptor = descriptor
        self.process = process
        self.screen = ""

    def read(self) -> None:
        """Add what the program has written to the screen."""
        self.screen += os.read(self.descriptor, 65536).decode()

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.descriptor, keys.encode())

    async def shows(self, text: str) -> None:
        """Wait until a text is on the screen."""

        async def shown() -> bool:
            return text in self.screen

        await eventually(shown, 60, f"{text!r} on the screen: {self.screen!r}")


@asynccontextmanager
async def terminal_with_playground(directory: Path) -> AsyncIterator[Terminal]:
    """Run the playground on a terminal, with its temporary files in a directory."""
    controller, device = pty.openpty()
    # A session's leader makes the first terminal that it opens its own: needed for Ctrl-C.
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(device), sys.executable, PLAYGROUND),
        env={**os.environ, "TMPDIR": str(directory)},
        start_new_session=True,
    )
    terminal = Terminal(controller, process)
    asyncio.get_running_loop().add_reader(controller, terminal.read)
    try:
        yield terminal
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
        asyncio.get_running_loop().remove_reader(controller)
        os.close(controller)
        os.close(device)


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
async def test_terminal_shows_a_chat_until_a_key_ends_it(tmp_path: Path, key: str) -> None:
    """There are progress, a way to join, a prompt and answers; Ctrl-C and Ctrl-D leave nothing."""
    async with terminal_with_playground(tmp_path) as terminal:
        await terminal.shows("Starting a homeserver ... ")
        await terminal.shows("homeserver  http://127.0.0.1:")
        await terminal.shows("> ")
        terminal.type("!replybot hello\n")
        await terminal.shows("bot: hello\r\n> ")
        terminal.type(key)
        assert await asyncio.wait_for(terminal.process.wait(), 30) == 0
    assert "Traceback" not in terminal.screen
    assert_nothing_left(tmp_path)


async def test_ctrl_c_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    """Interrupted before the homeserver is up, it stops that homeserver too."""
    async with terminal_with_playground(tmp_path) as terminal:
        await terminal.shows("Starting a homeserver ... ")

        async def starts() -> bool:
            return any("synapse" in line for line in processes_with(f"TMPDIR={tmp_path}"))

        await eventually(starts)
        terminal.type("\x03")
        assert await asyncio.wait_for(terminal.process.wait(), 30) == 0
    assert "Traceback" not in terminal.screen
    assert_nothing_left(tmp_path)
