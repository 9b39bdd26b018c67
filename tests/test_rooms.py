"""What people do in rooms: threads, mentions, edits, upgrades, encryption, invitations."""

from __future__ import annotations

from typing import Any

import pytest
import support.proxy as faults
from conftest import People
from support.bot import Bot, eventually
from support.homeserver import MatrixError, User
from support.proxy import Proxy


async def last_reply(people: People, user: User, room_id: str, count: int = 1) -> dict[str, Any]:
    """Wait until the bot has answered so often, return the event of its last reply."""
    await people.replies(user, room_id, count)
    events = await user.events(room_id)
    return [event for event in events if event["sender"] == people.bot_id][-1]


async def test_reply_to_a_thread_lands_in_the_thread(people: People, alice: User, bot: Bot) -> None:
    """It refers to the root of the thread, and for clients without threads to the command."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    root = await alice.send(room_id, "let us have a thread")
    relation = {
        "rel_type": "m.thread",
        "event_id": root,
        "is_falling_back": True,
        "m.in_reply_to": {"event_id": root},
    }
    command = await alice.send(room_id, "!replybot here", **{"m.relates_to": relation})
    reply = await last_reply(people, alice, room_id)
    assert reply["content"]["body"] == "here"
    assert reply["content"]["m.relates_to"] == {
        "rel_type": "m.thread",
        "event_id": root,
        "is_falling_back": True,
        "m.in_reply_to": {"event_id": command},
    }
    thread = await alice.request("GET", f"/_matrix/client/v1/rooms/{room_id}/relations/{root}")
    assert reply["event_id"] in [event["event_id"] for event in thread["chunk"]]


async def test_reply_outside_a_thread_relates_to_nothing(
    people: People, alice: User, bot: Bot
) -> None:
    """A rich reply to another message is answered with a plain message."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    quoted = await alice.send(room_id, "what did you say?")
    relation = {"m.in_reply_to": {"event_id": quoted}}
    await alice.send(room_id, "!replybot nothing", **{"m.relates_to": relation})
    reply = await last_reply(people, alice, room_id)
    assert reply["content"] == {"msgtype": "m.text", "body": "nothing", "m.mentions": {}}


MALFORMED_RELATIONS: list[Any] = [
    None,
    "thread",
    [],
    {"rel_type": "m.thread"},
    {"rel_type": "m.thread", "event_id": None},
    {"rel_type": "m.thread", "event_id": 42},
    {"rel_type": ["m.thread"], "event_id": "$root"},
    {"rel_type": "m.unknown", "event_id": "$other"},
    {"m.in_reply_to": "someone"},
]


async def test_malformed_relation_is_ignored(people: People, alice: User, bot: Bot) -> None:
    """The command is answered, with a message that relates to nothing."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    accepted = []
    for n, relation in enumerate(MALFORMED_RELATIONS):
        try:
            await alice.send(room_id, f"!replybot {n}", **{"m.relates_to": relation})
            accepted.append(str(n))
        except MatrixError:
            continue  # The homeserver itself does not let this one through.
    assert len(accepted) > len(MALFORMED_RELATIONS) / 2
    assert await people.replies(alice, room_id, len(accepted)) == accepted
    for event in await alice.events(room_id):
        assert event["sender"] != people.bot_id or "m.relates_to" not in event["content"]


async def test_reply_pings_nobody(people: People, alice: User, bot: Bot) -> None:
    """Neither @room nor a user who is mentioned in a command is mentioned by the reply."""
    carol = await people.user("carol")
    room_id = await people.room_with_bot(alice, carol)
    await bot.run()
    mentions = {"room": True, "user_ids": [carol.user_id]}
    body = f"@room {carol.user_id}, dinner!"
    await alice.send(room_id, f"!replybot {body}", **{"m.mentions": mentions})
    reply = await last_reply(people, alice, room_id)
    assert reply["content"] == {"msgtype": "m.text", "body": body, "m.mentions": {}}
    notifications = await carol.request("GET", "/notifications", only="highlight")
    assert people.bot_id not in [n["event"]["sender"] for n in notifications["notifications"]]


async def test_edit_gets_no_second_answer(people: People, alice: User, bot: Bot) -> None:
    """An answered command that is edited, even twice, stays answered once, over a restart too."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    command = await alice.send(room_id, "!replybot fisrt")
    await people.replies(alice, room_id, 1)
    for body in ("!replybot first", "!replybot 1st"):
        edit = {
            "m.new_content": {"msgtype": "m.text", "body": body},
            "m.relates_to": {"rel_type": "m.replace", "event_id": command},
        }
        await alice.send(room_id, f"* {body}", **edit)
        # A body without the usual star does not make it a new command.
        await alice.send(room_id, body, **edit)
    await bot.stop()
    await bot.start()
    await alice.send(room_id, "!replybot last")
    assert await people.replies(alice, room_id, 2) == ["fisrt", "last"]


async def test_lines_are_kept(people: People, alice: User, bot: Bot) -> None:
    """A command of several lines is answered with all of them, empty and indented ones too."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await alice.send(room_id, "!replybot\none\n\n  two\r\nthree\n")
    assert await people.replies(alice, room_id, 1) == ["one\n\n  two\r\nthree"]


async def test_upgraded_room_is_followed(people: People, alice: User, bot: Bot) -> None:
    """Invited into the new room, the bot answers there, also what was asked before it joined."""
    old = await people.room_with_bot(alice)
    await bot.run()
    await alice.send(old, "!replybot in the old room")
    await people.replies(alice, old, 1)
    upgrade = await alice.request("POST", f"/rooms/{old}/upgrade", {"new_version": "11"})
    new = upgrade["replacement_room"]
    await alice.invite(new, people.bot_id)
    await alice.send(new, "!replybot in the new room")
    assert await people.replies(alice, new, 1) == ["in the new room"]
    assert await alice.bodies(old, people.bot_id) == ["in the old room"]


ENCRYPTED = {
    "algorithm": "m.megolm.v1.aes-sha2",
    "ciphertext": "AwgAEnACgAkLmt6qF84IK",
    "device_id": "RJYKSTBOIE",
    "sender_key": "IlRMeOPX2e0MurIyfWEucYBRVOEEUMrOHqn/8mLqMjA",
    "session_id": "X3lUlvLELLYxeTx4yOVu6UDpasGEVO0Jbu+QFnm0cKQ",
}


async def test_encrypted_room_is_told_once(people: People, alice: User, bot: Bot) -> None:
    """It gets one notice, not one for each message, nor another one after a restart."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await alice.send_event(room_id, "m.room.encrypted", ENCRYPTED)
    notice = await last_reply(people, alice, room_id)
    assert notice["content"]["msgtype"] == "m.notice"
    assert "encrypted" in notice["content"]["body"]
    assert notice["content"]["m.mentions"] == {}
    assert f"{room_id} is encrypted" in bot.log
    await alice.send_event(room_id, "m.room.encrypted", ENCRYPTED)
    await bot.stop()
    await bot.start()
    await alice.send_event(room_id, "m.room.encrypted", ENCRYPTED)
    await alice.send(room_id, "!replybot in clear")
    assert (await people.replies(alice, room_id, 2))[1:] == ["in clear"]
    assert bot.log.count(f"{room_id} is encrypted") == 2


async def left(people: People, user: User, room_id: str) -> None:
    """Wait until the bot has rejected the invitation to a room."""

    async def has_left() -> bool:
        return people.bot_id in await user.members(room_id, "leave")

    await eventually(has_left, what="the rejection")


async def test_only_allowed_inviters_are_followed(people: People, alice: User, bot: Bot) -> None:
    """The invitation of somebody who is not in MATRIX_INVITERS is rejected, the other accepted."""
    mallory = await people.user("mallory")
    bot.environment["MATRIX_INVITERS"] = f"@nobody:example.org {alice.user_id}"
    await bot.run()
    rejected = await mallory.create_room(people.bot_id)
    await left(people, mallory, rejected)
    await bot.logs(f"Rejected the invitation of {mallory.user_id} to {rejected}")
    accepted = await alice.create_room(people.bot_id)
    await alice.send(accepted, "!replybot hello")
    assert await people.replies(alice, accepted, 1) == ["hello"]


async def test_inviter_is_who_invited_not_who_else_is_in_the_room(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """It counts who sent the invitation itself, also if the homeserver tells of other members."""
    mallory = await people.user("mallory")
    proxied_bot.environment["MATRIX_INVITERS"] = alice.user_id
    member = {"type": "m.room.member", "content": {"membership": "join"}}

    def tell_of_members(answer: Any) -> Any:
        for room in answer.get("rooms", {}).get("invite", {}).values():
            for user_id in (alice.user_id, mallory.user_id):
                events = room["invite_state"]["events"]
                event = {**member, "sender": user_id, "state_key": user_id}
                events[:] = [event, *events, event]
        return answer

    await proxied_bot.run()
    hers, his = [
        await user.create_room(other.user_id)
        for user, other in ((alice, mallory), (mallory, alice))
    ]
    await mallory.join(hers)
    await alice.join(his)
    with proxy.inject(faults.rewrite(tell_of_members), faults.SYNC):
        await mallory.invite(hers, people.bot_id)
        await left(people, alice, hers)
        await alice.invite(his, people.bot_id)
        await alice.send(his, "!replybot hello")
        assert await people.replies(alice, his, 1) == ["hello"]


@pytest.mark.parametrize("patterns", ["@*:echobot.test", "@alice*:* @me:example.org", "*"])
async def test_pattern_allows_inviters(
    people: People, alice: User, bot: Bot, patterns: str
) -> None:
    """A star in MATRIX_INVITERS stands for anything."""
    bot.environment["MATRIX_INVITERS"] = patterns
    await bot.run()
    room_id = await alice.create_room(people.bot_id)
    await alice.send(room_id, "!replybot hello")
    assert await people.replies(alice, room_id, 1) == ["hello"]


async def test_invitation_while_it_was_away_is_judged_too(
    people: People, alice: User, bot: Bot
) -> None:
    """MATRIX_INVITERS counts for invitations that were pending at the start."""
    mallory = await people.user("mallory")
    bot.environment["MATRIX_INVITERS"] = alice.user_id
    rejected = await mallory.create_room(people.bot_id)
    accepted = await alice.create_room(people.bot_id)
    await bot.start()
    await left(people, mallory, rejected)
    await alice.send(accepted, "!replybot hello")
    assert await people.replies(alice, accepted, 1) == ["hello"]
