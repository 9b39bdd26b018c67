"""The bot runs on every Python that it is said to run on, and on what nio allows."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.bot import ECHOBOT, Bot
from support.people import People
from support.proxy import Proxy

REQUIREMENTS = ECHOBOT.with_name("requirements.txt")

# As PEP 723 has it: what uv and pipx read to set all up by themselves.
METADATA = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"


def interpreter(version: str) -> str | None:
    """Return a Python of that version that really runs here."""
    name = f"python{version}"
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = [Path(sys.executable).with_name(name), *root.glob(f"versions/{version}.*/bin/{name}")]
    for found in filter(None, map(shutil.which, [name, *map(str, paths)])):
        # What is on PATH may be an empty shim of pyenv.
        if subprocess.run([found, "-c", "import venv"], check=False).returncode == 0:
            return found
    return None


async def run(*command: object) -> None:
    """Run a command, and assert that it succeeds."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# The oldest with the oldest aiohttp that nio allows: each of them takes a quarter of a minute.
VERSIONS = [("3.11", "aiohttp==3.10.*"), *((version, "aiohttp") for version in PYTHONS[1:])]


def test_inline_metadata_says_what_requirements_txt_says() -> None:
    """There is one block, of a script: the same requirements, and the oldest Python tried here."""
    source = ECHOBOT.read_text()
    (block,) = re.finditer(METADATA, source)
    assert block["type"] == "script"
    metadata = tomllib.loads(re.sub("(?m)^# ?", "", block["content"]))
    lines = REQUIREMENTS.read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert metadata == {"requires-python": f">={PYTHONS[0]}", "dependencies": requirements}
    # Below the line for the shell, above all else.
    assert source[: block.start()].count("\n") <= 1


@pytest.mark.long
@pytest.mark.parametrize(("version", "aiohttp"), VERSIONS)
async def test_bot_works_with_nothing_but_its_requirements(
    people: People, bot: Bot, proxy: Proxy, tmp_path: Path, version: str, aiohttp: str
) -> None:
    """Also with the oldest aiohttp that nio allows: through a proxy it joins, answers, goes on."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"Python {version} is not on this machine")
    bot.python = tmp_path / "bin" / "python"
    await run(python, "-m", "venv", "--without-pip", tmp_path)
    pip = (sys.executable, "-m", "pip", "--python", bot.python)
    await run(*pip, "install", "--quiet", "--no-compile", "-r", REQUIREMENTS, aiohttp)
    bot.environment |= {"HTTP_PROXY": proxy.url, "http_proxy": proxy.url, "NO_PROXY": ""}
    await bot.run()
    room = await people.invite()
    await room.command("one")
    assert await room.replies(1) == ["one"]
    await bot.kill()
    await room.command("two")
    await bot.start()
    assert await room.replies(2) == ["one", "two"]
    assert await bot.stop() == 0
    assert "Warning" not in bot.log
    assert proxy.requests
