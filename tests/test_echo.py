"""What is answered and what is not."""

import pytest
from support.bot import Bot
from support.homeserver import PASSWORD
from support.people import People, Room

pytestmark = pytest.mark.others

ENCRYPTED = {
    "algorithm": "m.megolm.v1.aes-sha2",
    "ciphertext": "AwgAEnACgAkLmt6qF84IK",
    "device_id": "RJYKSTBOIE",
    "sender_key": "IlRMeOPX2e0MurIyfWEucYBRVOEEUMrOHqn/8mLqMjA",
    "session_id": "X3lUlvLELLYxeTx4yOVu6UDpasGEVO0Jbu+QFnm0cKQ",
}


async def test_command_is_answered_with_its_rest(room: Room, bot: Bot) -> None:
    """In a text that mentions nobody, whoever the command mentions; nothing older is answered."""
    await room.command(*[f"before the first start {n}" for n in range(15)])
    await bot.run()
    body = f"hello world and @room, {room.user.user_id}"
    mentions = {"room": True, "user_ids": [room.user.user_id]}
    command = await room.say(f"!replybot {body}", **{"m.mentions": mentions})
    assert await room.replies(1) == [body]
    (reply,) = await room.events()
    expected = {"msgtype": "m.text", "body": body, "m.mentions": {}, "echobot.answers": command}
    assert reply["content"] == expected
    if room.user.homeserver.name != "Conduit":  # It keeps none.
        notified = await room.user.request("GET", "/notifications", only="highlight")
        assert notified["notifications"] == []


async def test_login_and_position_are_those_of_the_tutorial(
    people: People, room: Room, bot: Bot
) -> None:
    """The log has its line; next_batch is a sync token, which moves on with every message."""
    await bot.run()
    assert f"Logged in as {people.bot_id}, device id: {bot.session['device_id']}." in bot.log
    before = bot.next_batch
    await room.say("hello")
    await bot.saves(other_than=before)
    await people.account.request("GET", "/sync", since=bot.next_batch)


async def test_only_commands_of_others_are_answered(people: People, room: Room, bot: Bot) -> None:
    """Other texts, notices, emotes and own messages get no answer."""
    await bot.run()
    own = await people.homeserver.log_in(people.bot_id, PASSWORD)
    await own.send(room.room_id, "!replybot own message")
    await room.say("hello !replybot")
    await room.say("!replybot notice", msgtype="m.notice")
    await room.say("!replybot emote", msgtype="m.emote")
    await room.command("last")
    assert await room.replies(2) == ["!replybot own message", "last"]


async def test_edited_or_redacted_command_gets_no_answer(room: Room, bot: Bot) -> None:
    """Edited twice, it stays answered once, over a restart too; redacted while down, it is none."""
    await bot.run()
    command = await room.command("fisrt")
    await room.replies(1)
    for body in ("!replybot first", "!replybot 1st"):
        edit = {
            "m.new_content": {"msgtype": "m.text", "body": body},
            "m.relates_to": {"rel_type": "m.replace", "event_id": command},
        }
        # A body without the usual star does not make it a new command.
        await room.say(f"* {body}", body, **edit)
    await bot.stop()
    encrypted = await room.user.send_event(room.room_id, "m.room.encrypted", ENCRYPTED)
    for event_id in (encrypted, await room.command("redacted before it was seen")):
        await room.user.request("PUT", f"/rooms/{room.room_id}/redact/{event_id}/{event_id}", {})
    await bot.start()
    await room.command("last")
    assert await room.replies(2) == ["fisrt", "last"]


async def test_no_reply_is_a_command(room: Room, bot: Bot) -> None:
    """Every `!replybot` is removed, so that two such bots do not talk for ever; lines stay.

    Alone it is answered with one line on how to use it.
    """
    replies = {
        "  !replybot one\n two !replybot": "one\n two",
        " !reply!replybotbot nested": "nested",
        " !rep!reply!replybotbotlybot twice": "twice",
        "\none\n\n  two\r\nthree\n": "one\n\n  two\r\nthree",
    }
    await bot.run()
    await room.say("!replybot", *(f"!replybot{rest}" for rest in replies))
    assert await room.replies(5) == ["Usage: !replybot text to repeat", *replies.values()]


async def test_reply_to_a_thread_lands_in_the_thread(room: Room, bot: Bot) -> None:
    """It refers to the root of the thread, and for clients without threads to the command."""
    await bot.run()
    root = await room.say("let us have a thread")
    thread = {"rel_type": "m.thread", "event_id": root, "is_falling_back": True}
    relation = {**thread, "m.in_reply_to": {"event_id": root}}
    command = await room.say("!replybot here", **{"m.relates_to": relation})
    assert await room.replies(1) == ["here"]
    (reply,) = await room.events()
    expected = {**thread, "m.in_reply_to": {"event_id": command}}
    assert reply["content"]["m.relates_to"] == expected
    path = f"/_matrix/client/v1/rooms/{room.room_id}/relations/{root}"
    events = (await room.user.request("GET", path))["chunk"]
    assert reply["event_id"] in [event["event_id"] for event in events]


async def test_reply_outside_a_thread_relates_to_nothing(room: Room, bot: Bot) -> None:
    """A rich reply, and what is no relation at all, is answered with a plain message."""
    relations: list[object] = [
        *(None, "thread", [], {"m.in_reply_to": "someone"}),
        {"m.in_reply_to": {"event_id": "$quoted"}},
        *({"rel_type": "m.thread"}, {"rel_type": "m.thread", "event_id": None}),
        {"rel_type": ["m.thread"], "event_id": "$root"},
    ]
    await bot.run()
    commands = [await room.say("!replybot hello", **{"m.relates_to": it}) for it in relations]
    await room.replies(len(relations))
    contents = [event["content"] for event in await room.events()]
    plain = {"msgtype": "m.text", "body": "hello", "m.mentions": {}}
    assert contents == [{**plain, "echobot.answers": command} for command in commands]


async def test_upgraded_room_is_followed(people: People, room: Room, bot: Bot) -> None:
    """Invited into the new room, the bot answers there, also what was asked before it joined."""
    await bot.run()
    await room.command("in the old room")
    await room.replies(1)
    path = f"/rooms/{room.room_id}/upgrade"
    upgrade = await room.user.request("POST", path, {"new_version": "11"})
    new = Room(upgrade["replacement_room"], room.user, room.bot_id)
    await room.user.invite(new.room_id, people.bot_id)
    await new.command("in the new room")
    assert await new.replies(1) == ["in the new room"]
    assert await room.bodies() == ["in the old room"]


async def test_encrypted_room_is_told_once_what_to_do(room: Room, bot: Bot) -> None:
    """It gets one notice, not one for each message, nor another one after a restart."""
    await bot.run()
    await room.user.send_event(room.room_id, "m.room.encrypted", ENCRYPTED)
    await room.replies(1)
    (notice,) = await room.events()
    assert notice["content"]["msgtype"] == "m.notice"
    assert notice["content"]["m.mentions"] == {}
    for word in ("encrypted", "encryption", "off", "invite"):
        assert word in notice["content"]["body"]
    assert room.room_id in bot.log
    await room.user.send_event(room.room_id, "m.room.encrypted", ENCRYPTED)
    await bot.stop()
    await bot.start()
    await room.user.send_event(room.room_id, "m.room.encrypted", ENCRYPTED)
    await room.command("in clear")
    assert (await room.replies(2))[1:] == ["in clear"]
