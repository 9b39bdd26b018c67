"""What the README says is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from conftest import People
from support.bot import ECHOBOT, Bot, fork
from support.homeserver import User

README = ECHOBOT.with_name("README.md").read_text()
BEFORE, AFTER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def statements(source: str) -> list[str]:
    """Return what reply_to does in a source, without its docstring and comments."""
    (function,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "reply_to"
    ]
    return [ast.unparse(node) for node in function.body if not isinstance(node, ast.Expr)]


def test_reply_to_is_shown_as_it_is() -> None:
    """The function that the README shows for a start is the one in the file."""
    assert statements(BEFORE) == statements(ECHOBOT.read_text())


async def test_dice_are_rolled(people: People, alice: User, bot: Bot) -> None:
    """The example of another bot works when it is put into the file, with no more change."""
    room_id = await people.room_with_bot(alice)
    bot.script = fork(bot.directory, AFTER)
    await bot.run()
    for body in ("!roll 3", "!replybot hello", "!rolls", "!roll"):
        await alice.send(room_id, body)
    three, one = await people.replies(alice, room_id, 2)
    assert re.fullmatch("[1-6] [1-6] [1-6]", three)
    assert re.fullmatch("[1-6]", one)


def test_every_promise_names_a_test_that_exists() -> None:
    """Each row has at least one, and each name in the README is that of a test."""
    tests = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        tests |= set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))
    promises = README.partition("| promise |")[2].partition("\n\n")[0].splitlines()[2:]
    assert promises
    assert all("`test_" in promise for promise in promises)
    assert set(re.findall(r"`(test_\w+)`", README)) <= tests


def test_every_variable_of_the_help_is_in_the_readme() -> None:
    """The README has the variables of --help and no others; what systemd sets needs no row."""
    documentation = ast.get_docstring(ast.parse(ECHOBOT.read_text())) or ""
    table = README.partition("| variable |")[2].partition("\n\n")[0]
    rows = "".join(row.split("|")[1] for row in table.splitlines()[2:])
    pattern = r"\b(?:MATRIX_\w+|LOG_LEVEL|STATE_DIRECTORY|[A-Z]+_PROXY)\b"
    assert set(re.findall(pattern, rows)) == set(re.findall(pattern, documentation))
