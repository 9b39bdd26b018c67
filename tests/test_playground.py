"""The playground answers in a pipe and in a terminal, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import psutil
import pytest

PLAYGROUND = Path(__file__).with_name("playground.py")


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a TMPDIR, of which no process and no file may be left at the end."""
    yield {**os.environ, "TMPDIR": str(tmp_path)}
    for process in psutil.process_iter(["environ", "cmdline"]):
        assert (process.info["environ"] or {}).get("TMPDIR") != str(tmp_path), process.info
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def terminal(environment: dict[str, str]) -> Iterator[pexpect.spawn[str]]:
    """The playground on a terminal of its own, as it starts."""
    command = [sys.executable, str(PLAYGROUND)]
    terminal = pexpect.spawn("env", command, timeout=60, env=environment, encoding="utf-8")
    terminal.expect_exact("Starting a homeserver")
    yield terminal
    terminal.close(force=True)


def test_pipe_gets_the_answers_and_status_0(environment: dict[str, str]) -> None:
    """The answers are on stdout, also when the last line gets none."""
    run = subprocess.run(
        [sys.executable, PLAYGROUND],
        input="!replybot one\nno command\n\n!replybot two\nno newline at the end",
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert run.stdout == "one\ntwo\n"
    assert run.returncode == 0, run.stderr


def test_python_without_the_requirements_is_told_what_to_install() -> None:
    """It takes one line, and no traceback."""
    command = [sys.executable, "-S", str(PLAYGROUND)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert "tests/requirements.txt" in line


KEYS = {"Ctrl-C": "\x03", "Ctrl-D": "\x04", "Ctrl-D twice after half a line": "half\x04\x04"}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_terminal_shows_a_chat_until_a_key_ends_it(terminal: pexpect.spawn[str], key: str) -> None:
    """There are progress, what is answered, a way to join, a prompt and answers."""
    for text in ("what starts with !replybot", "homeserver  http://127.0.0.1:", "> "):
        terminal.expect_exact(text)
    terminal.send("!replybot hello\n")
    terminal.expect_exact("bot: hello\r\n> ")
    ends(terminal, key)


def test_ctrl_c_while_it_starts_leaves_nothing(terminal: pexpect.spawn[str]) -> None:
    """Interrupted before the homeserver is up, it stops that homeserver too."""
    playground = psutil.Process(terminal.pid)
    while not playground.children():
        assert terminal.isalive()
    ends(terminal, "\x03")


def ends(terminal: pexpect.spawn[str], key: str) -> None:
    """Press the key; assert that the playground ends in order."""
    terminal.send(key)
    terminal.expect_exact(pexpect.EOF)
    assert "Traceback" not in (terminal.before or "")
    terminal.close()
    assert terminal.exitstatus == 0
