"""The bot runs on every Python that it is said to run on."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.bot import ECHOBOT, Bot
from support.homeserver import User
from support.people import People

VERSIONS = [f"3.{minor}" for minor in sorted({*range(11, 15), sys.version_info.minor})]
REQUIREMENTS = ECHOBOT.with_name("requirements.txt")


def interpreter(version: str) -> Path | None:
    """Return a Python of this version that really runs, None if the machine has none."""
    candidates = [sys.executable, shutil.which(f"python{version}")]
    if shutil.which("pyenv"):
        command = ["pyenv", "root"]
        root = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        candidates += map(str, Path(root).glob(f"versions/{version}.*/bin/python"))
    script = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        # What stands for it on PATH may be an empty shim.
        run = subprocess.run([candidate, "-c", script], capture_output=True, text=True, check=False)
        if run.stdout.strip() == version:
            return Path(candidate)
    return None


async def run(*command: object) -> str:
    """Run a command, return its output."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode().strip()


async def new_environment(version: str, directory: Path) -> Path | None:
    """Make a virtual environment with what the bot needs, return its Python."""
    python = interpreter(version)
    if python is None:
        return None
    await run(python, "-m", "venv", "--without-pip", directory)
    new = directory / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", new)
    await run(*pip, "install", "--quiet", "--no-compile", "-r", REQUIREMENTS)
    return new


@pytest.fixture(scope="module")
async def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    """Virtual environments for all versions that the machine has, made at the same time."""
    directory = tmp_path_factory.mktemp("python")
    making = [new_environment(version, directory / version) for version in VERSIONS]
    return dict(zip(VERSIONS, await asyncio.gather(*making), strict=True))


@pytest.mark.parametrize("version", VERSIONS)
async def test_bot_answers_on_python(
    people: People,
    alice: User,
    bot: Bot,
    environments: dict[str, Path | None],
    version: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With nothing but requirements.txt it joins, answers, goes on after a kill and stops."""
    python = environments[version]
    if python is None:
        pytest.skip(f"Python {version} is not on this machine")
    bot.python = python
    await bot.run()
    room = await people.invite(alice)
    await room.command("one")
    assert await room.replies(1) == ["one"]
    await bot.kill()
    await room.command("two")
    await bot.start()
    assert await room.replies(2) == ["one", "two"]
    assert await bot.stop() == 0
    assert "Warning" not in bot.log
    with capsys.disabled():
        print(f"\nechobot.py answers on {await run(python, '--version')}", end=" ")
