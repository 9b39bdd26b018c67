"""Invitations are accepted, however long that takes, from whom they may; old history stays old."""

import asyncio
from typing import Any

import pytest
import support.proxy as faults
from support.bot import Bot, eventually
from support.people import People, Room
from support.proxy import JOIN, POLL, Proxy
from support.scripted import ALICE, DENDRITE, field_of


@pytest.mark.others
async def test_history_before_the_invitation_is_not_answered(people: People, bot: Bot) -> None:
    """In a room with a past, only what follows the invitation counts, also over a downtime."""
    await bot.run()
    await bot.stop()
    alice = people.alice
    room = Room(await alice.create_room(preset="public_chat"), alice, people.bot_id)
    await room.command(*[f"old {n}" for n in range(30)])
    await alice.invite(room.room_id, people.bot_id)
    await room.command("invited")
    await bot.start()
    await room.bot_is("join")
    await room.command("joined")
    assert await room.replies(2) == ["invited", "joined"]


@pytest.mark.others
@pytest.mark.parametrize("has_replied", [False, True])
async def test_kicked_and_invited_again_where_history_is_hidden(
    people: People, bot: Bot, has_replied: bool
) -> None:
    """Whatever was said meanwhile, what precedes the first start is not answered then."""
    content = {"history_visibility": "joined"}
    state = {"type": "m.room.history_visibility", "state_key": "", "content": content}
    room = await people.room(initial_state=[state])
    await room.command("old 0", "old 1")
    await bot.run()
    expected = ["first"] * has_replied
    await room.command(*expected)
    await room.replies(len(expected))
    await room.user.request("POST", f"/rooms/{room.room_id}/kick", {"user_id": people.bot_id})
    await room.say("behind its back")
    other = await people.room()
    await other.command("hello")
    await other.replies(1)
    position = bot.next_batch
    await other.say("this ends the poll")
    await bot.saves(other_than=position)
    await room.user.invite(room.room_id, people.bot_id)
    await bot.logs(f"Joined {room.room_id}")
    await eventually(lambda: not bot.unfinished)  # Conduit hides what comes with the join.
    await room.command("last")
    assert await room.replies(len(expected) + 1) == [*expected, "last"]


@pytest.mark.others
async def test_invitations_of_the_first_start_are_followed_once(people: People, bot: Bot) -> None:
    """Two syncs tell them; whether welcome or not, no request is repeated and nothing is owed."""
    bot.environment["MATRIX_INVITERS"] = people.alice.user_id
    mallory = await people.user("mallory")
    rooms = [await people.invite(mallory) for _ in range(5)]
    rooms += [await people.invite() for _ in range(5)]
    await bot.run()
    await bot.logs("Joined", times=5)
    await bot.logs("Left", times=5)
    await eventually(lambda: not bot.unfinished)
    for room in rooms[5:]:
        await room.command("hello")
        assert await room.replies(1) == ["hello"]
    assert bot.log.count("Joined") == bot.log.count("Left") == 5
    assert "Trouble" not in bot.log


@pytest.mark.others
@pytest.mark.parametrize("is_first_start", [True, False])
async def test_join_that_hangs_holds_nobody_up_and_survives_a_kill(
    people: People, room: Room, proxied_bot: Bot, proxy: Proxy, is_first_start: bool
) -> None:
    """Another room is answered meanwhile; after a kill the bot joins, and all is said once.

    What was said since the invitation counts, before the first start too.
    """
    with proxy.inject(faults.hold(asyncio.Event().wait), JOIN) as hanging:
        if is_first_start:
            invited = await people.invite()
            await invited.command("before the first start")
        await proxied_bot.run()
        if not is_first_start:
            invited = await people.invite()
        await hanging.happens()
        await invited.command("first")
        await room.command(*range(5))
        assert await room.replies(5) == [str(n) for n in range(5)]
        await proxied_bot.kill()
    await room.command("meanwhile")
    await proxied_bot.start()
    await invited.bot_is("join")
    since = ["before the first start"] * is_first_start
    assert await invited.replies(len(since) + 1) == [*since, "first"]
    assert (await room.replies(6))[5:] == ["meanwhile"]


@pytest.mark.others
async def test_commands_around_a_join_are_answered_once(
    people: People, room: Room, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Polls for other rooms pass them by; then the join and the first timeline both bring them."""
    await proxied_bot.run()
    until = asyncio.Event()
    with proxy.inject(faults.hold(until.wait), JOIN) as hanging:
        invited = await people.invite()
        await hanging.happens()
        early = [await invited.command(n) for n in range(5)]
        for n in range(3):
            await room.command(n)
            await room.replies(n + 1)
        until.set()
        await invited.replies(5)
    await invited.command("late")
    assert await invited.replies(6) == [*"01234", "late"]
    assert [proxied_bot.log.count(f"Answered {event_id}") for event_id in early] == [1] * 5


@pytest.mark.others
@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("allowed", ["{alice} @*:example.org", "@*:example.org @alice*:echo*"])
async def test_only_allowed_inviters_are_followed(
    people: People, bot: Bot, is_running: bool, allowed: str
) -> None:
    """Who is not in MATRIX_INVITERS, whose stars stand for anything, is rejected at any time."""
    mallory = await people.user("mallory")
    bot.environment["MATRIX_INVITERS"] = allowed.format(alice=people.alice.user_id)
    if is_running:
        await bot.run()
    rejected, accepted = [await people.invite(user) for user in (mallory, people.alice)]
    if not is_running:
        await bot.run()
    await rejected.bot_is("leave")
    await bot.logs(f"Left {rejected.room_id}, invited by {mallory.user_id}")
    await accepted.command("hello")
    assert await accepted.replies(1) == ["hello"]


@pytest.mark.others
async def test_last_of_two_inviters_counts(people: People, bot: Bot) -> None:
    """One who may invite does so over the invitation of another one, who may not."""
    mallory, alice = await people.user("mallory"), people.alice
    bot.environment["MATRIX_INVITERS"] = alice.user_id
    options = {"preset": "public_chat", "power_level_content_override": {"invite": 0}}
    room = Room(await mallory.create_room(people.bot_id, **options), alice, people.bot_id)
    await alice.join(room.room_id)
    await alice.invite(room.room_id, people.bot_id)
    await room.command("hello")
    await bot.start()
    assert await room.replies(1) == ["hello"]


async def test_inviter_is_who_invited_not_who_else_is_in_the_room() -> None:
    """It counts who sent the invitation itself, also if it is one over another one.

    The homeserver tells of other members, and that the bot was invited before.
    """
    mallory = "@mallory:echobot.test"
    joined = {"type": "m.room.member", "content": {"membership": "join"}}
    members = [{**joined, "sender": user, "state_key": user} for user in (ALICE, mallory)]

    def tell_of_members(answer: Any) -> Any:
        for room in answer["rooms"]["invite"].values():
            events = room["invite_state"]["events"]
            events[0]["unsigned"] = {"prev_content": {"membership": "invite"}}
            room["invite_state"]["events"] = [*members, *events, *members]
        return answer

    async with field_of() as field:
        field.bot.environment["MATRIX_INVITERS"] = ALICE
        rooms = {user: field.server.room("leave") for user in (mallory, ALICE)}
        with field.proxy.inject(faults.rewrite(tell_of_members), faults.SYNC):
            await field.bot.run()
            for inviter, room in rooms.items():
                room.set_membership("invite", inviter)
            rooms[ALICE].command("hello")
            await rooms[ALICE].answers("hello")
            await eventually(lambda: rooms[mallory].membership == "leave")


async def test_join_that_hangs_where_invitations_are_repeated() -> None:
    """After a kill amid the join, the first timeline of 10 begins long after the invitation."""
    async with field_of(DENDRITE, repeats_invitations=True, limits_first_timeline=False) as field:
        room = field.server.room("leave")
        await field.bot.run()
        until = asyncio.Event()
        with field.proxy.inject(faults.hold(until.wait), JOIN) as joining:
            room.command("old")
            room.set_membership("invite", ALICE)
            room.command(*range(12))
            await joining.happens()
            await field.proxy.counts(POLL, field.proxy.count(POLL) + 2)
            await field.bot.kill()
            await field.bot.start()
            await joining.happens(2)
            await field.proxy.counts(POLL, field.proxy.count(POLL) + 2)
            until.set()
        await room.answers(*range(12))
