"""What the README and the first look at echobot.py say is so."""

import ast
import re
from pathlib import Path
from statistics import median

from aiohttp import web
from support.bot import ECHOBOT, Bot, fork
from support.people import Room
from support.proxy import served

README = ECHOBOT.with_name("README.md").read_text()
IMPORTS = "\n".join(re.findall(r"`(from .*? import \w+)`", README))
BEFORE, AFTER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SOURCE = ECHOBOT.read_text()


def test_reply_to_is_shown_as_it_is() -> None:
    """The function that the README shows for a start is the one in the file, without comments."""
    signature, _, body = BEFORE.partition("\n")
    function = SOURCE.partition(signature)[2].partition("\n\n\n")[0]
    assert re.sub("  #.*", "", function).endswith(body.rstrip())


async def test_example_of_another_bot_works(room: Room, bot: Bot) -> None:
    """Put into the file, it asks a server (here of the test) and answers with formatted text."""

    async def forecast(request: web.Request) -> web.Response:
        return web.Response(text=f"{request.path[1:]}: <10 degrees")

    async with served(forecast) as url:
        bot.script = fork(bot.directory, AFTER.replace("https://wttr.in", url))
        source = bot.script.read_text()
        bot.script.write_text(source.replace("import json\n", f"import json\n{IMPORTS}\n"))
        await bot.run()
        await room.say("!weather Oslo", "!replybot hello", "!weathers", "!weather Rome")
        assert await room.replies(2) == ["Oslo: <10 degrees", "Rome: <10 degrees"]
    for event in await room.events():
        assert event["content"]["msgtype"] == "m.notice"
        assert "&lt;10 degrees" in event["content"]["formatted_body"]


def test_every_test_that_is_named_exists() -> None:
    """Each name of a test in the README is that of one."""
    tests: set[str] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        tests |= set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", README)) <= tests


def test_every_variable_of_the_help_is_in_the_readme() -> None:
    """The README has the variables of --help and no others; what systemd sets needs no row."""
    table = README.partition("| variable |")[2].partition("\n\n")[0]
    rows = "".join(row.split("|")[1] for row in table.splitlines()[2:])
    pattern = r"\b(?:MATRIX_\w+|LOG_LEVEL|STATE_DIRECTORY|[A-Z]+_PROXY)\b"
    assert set(re.findall(pattern, rows)) == set(re.findall(pattern, SOURCE))


def test_echobot_is_read_in_ten_minutes() -> None:
    """At most 31,000 bytes and 560 lines, no function over 30 lines, half of them at most 11.

    People read this file before they trust it with an account, and copy it to make a bot of their
    own: what does not fit into that they will not know. Fewer concepts, not denser lines.
    """
    assert len(SOURCE.encode()) <= 31_000
    assert len(SOURCE.splitlines()) <= 560
    lengths = [
        ((node.end_lineno or 0) - node.lineno + 1, node.name)
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [function for function in lengths if function[0] > 30] == []
    assert median(length for length, _ in lengths) <= 11
