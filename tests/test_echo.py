"""What is answered and what is not."""

from __future__ import annotations

from conftest import People
from support.bot import Bot, eventually
from support.homeserver import PASSWORD, User


async def test_command_is_answered_with_its_rest(people: People, alice: User, bot: Bot) -> None:
    """`!replybot hello world` is answered with `hello world`, in a text that mentions nobody."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await alice.send(room_id, "!replybot hello world")
    assert await people.replies(alice, room_id, 1) == ["hello world"]
    reply = (await alice.events(room_id))[-1]
    assert reply["content"] == {"msgtype": "m.text", "body": "hello world", "m.mentions": {}}


async def test_login_is_announced_as_in_the_tutorial(people: People, bot: Bot) -> None:
    """The log has the line of the tutorial, with the device that the homeserver knows."""
    await bot.run()
    device_id = bot.session["device_id"]
    assert f"Logged in as {people.bot_id}, device id: {device_id}." in bot.log
    assert device_id in await people.account.devices()


async def test_next_batch_holds_the_sync_token(people: People, alice: User, bot: Bot) -> None:
    """The file is plain text that moves on with every message, as in the tutorial."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    path = bot.state / "next_batch"
    before = path.read_text()
    await alice.send(room_id, "hello")

    async def moved() -> bool:
        return path.read_text() != before

    await eventually(moved)
    await people.account.request("GET", "/sync", since=path.read_text())


async def test_only_commands_of_others_are_answered(people: People, alice: User, bot: Bot) -> None:
    """Other texts, notices, emotes, edits, redacted and own messages get no answer."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    own = await people.homeserver.log_in(people.bot_id, PASSWORD)
    await own.send(room_id, "!replybot own message")
    await alice.send(room_id, "hello !replybot")
    await alice.send(room_id, "!replybot notice", msgtype="m.notice")
    await alice.send(room_id, "!replybot emote", msgtype="m.emote")
    event_id = await alice.send(room_id, "!replybot first")
    assert (await people.replies(alice, room_id, 2))[1:] == ["first"]
    await alice.send(
        room_id,
        "!replybot edited",
        **{
            "m.new_content": {"msgtype": "m.text", "body": "!replybot edited"},
            "m.relates_to": {"rel_type": "m.replace", "event_id": event_id},
        },
    )
    await alice.send(room_id, "!replybot last")
    assert (await people.replies(alice, room_id, 3))[1:] == ["first", "last"]


async def test_odd_parts_do_not_cost_the_answer(people: People, alice: User, bot: Bot) -> None:
    """A command is answered whatever else is in its content."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    odd: list[dict[str, object]] = [{"formatted_body": None}, {"format": 5}, {"m.relates_to": []}]
    for n, content in enumerate(odd):
        await alice.send(room_id, f"!replybot {n}", **content)
    assert await people.replies(alice, room_id, len(odd)) == ["0", "1", "2"]


async def test_redacted_command_is_not_answered(people: People, alice: User, bot: Bot) -> None:
    """A command that was redacted while the bot was away gets no answer."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await bot.stop()
    event_id = await alice.send(room_id, "!replybot regretted")
    await alice.request("PUT", f"/rooms/{room_id}/redact/{event_id}/1", {})
    await alice.send(room_id, "!replybot meant")
    await bot.start()
    assert await people.replies(alice, room_id, 1) == ["meant"]


async def test_bare_command_gets_a_hint(people: People, alice: User, bot: Bot) -> None:
    """`!replybot` alone is answered with one line on how to use it."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await alice.send(room_id, "!replybot")
    (hint,) = await people.replies(alice, room_id, 1)
    assert "!replybot" in hint
    assert not hint.startswith("!replybot")
    assert "\n" not in hint


async def test_no_reply_is_a_command(people: People, alice: User, bot: Bot) -> None:
    """Every `!replybot` is removed, so that two such bots do not talk for ever; lines stay."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await alice.send(room_id, "!replybot  !replybot one\n two !replybot")
    assert await people.replies(alice, room_id, 1) == ["one\n two"]


async def test_history_before_the_first_start_is_not_answered(
    people: People, alice: User, bot: Bot
) -> None:
    """Commands that were sent before the bot was first started stay without answer."""
    room_id = await people.room_with_bot(alice)
    for n in range(15):
        await alice.send(room_id, f"!replybot old {n}")
    await bot.run()
    await alice.send(room_id, "!replybot new")
    assert await people.replies(alice, room_id, 1) == ["new"]
