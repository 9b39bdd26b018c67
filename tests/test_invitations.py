"""Invitations are accepted, however long that takes, and old history stays old."""

from __future__ import annotations

import asyncio

import support.proxy as faults
from conftest import People
from support.bot import Bot, eventually, fork
from support.homeserver import User
from support.proxy import Proxy


async def joined(people: People, user: User, room_id: str) -> None:
    """Wait until the bot is in the room."""

    async def is_member() -> bool:
        return people.bot_id in await user.members(room_id)

    await eventually(is_member, what="the join")


async def test_invitation_is_accepted(people: People, alice: User, bot: Bot) -> None:
    """The bot joins, and answers what is said from then on."""
    await bot.run()
    room_id = await alice.create_room(people.bot_id)
    await joined(people, alice, room_id)
    await alice.send(room_id, "!replybot hello")
    assert await people.replies(alice, room_id, 1) == ["hello"]


async def test_invitation_before_the_first_start_is_accepted(
    people: People, alice: User, bot: Bot
) -> None:
    """What was pending is accepted; what was said before the first start is not answered."""
    room_id = await alice.create_room(people.bot_id)
    await alice.send(room_id, "!replybot before the first start")
    await bot.start()
    await joined(people, alice, room_id)
    await alice.send(room_id, "!replybot hello")
    assert await people.replies(alice, room_id, 1) == ["hello"]


async def test_history_from_before_the_invitation_is_not_answered(
    people: People, alice: User, bot: Bot
) -> None:
    """In a room with a past, only what follows the invitation counts, also over a downtime."""
    await bot.run()
    await bot.stop()
    room_id = await alice.create_room(preset="public_chat")
    for n in range(30):
        await alice.send(room_id, f"!replybot old {n}")
    await alice.invite(room_id, people.bot_id)
    await alice.send(room_id, "!replybot invited")
    await bot.start()
    await joined(people, alice, room_id)
    await alice.send(room_id, "!replybot joined")
    assert await people.replies(alice, room_id, 2) == ["invited", "joined"]


async def test_reply_to_is_called_once_for_what_was_said_around_a_join(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """The join and the first timeline after it both bring it; that is no second command."""
    await proxied_bot.run()
    until = asyncio.Event()
    with proxy.inject(faults.hold(until), faults.JOIN) as hanging:
        room_id = await alice.create_room(people.bot_id)
        sent = [await alice.send(room_id, f"!replybot {n}") for n in range(5)]
        until.set()
        await people.replies(alice, room_id, 5)
        assert hanging.happened
    await alice.send(room_id, "!replybot last")
    assert (await people.replies(alice, room_id, 6))[5:] == ["last"]
    assert [proxied_bot.log.count(f"Answered {event_id}") for event_id in sent] == [1] * 5


async def test_join_that_hangs_holds_nobody_up_and_survives_a_kill(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Another room is answered meanwhile; after a kill the bot joins, and all is said once."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    with proxy.inject(faults.hold(asyncio.Event()), faults.JOIN) as hanging:
        invited = await alice.create_room(people.bot_id)
        await alice.send(invited, "!replybot first")
        for n in range(5):
            await alice.send(room_id, f"!replybot {n}")
        assert await people.replies(alice, room_id, 5) == [str(n) for n in range(5)]
        await proxied_bot.kill()
        assert hanging.happened
    await proxied_bot.start()
    await joined(people, alice, invited)
    assert await people.replies(alice, invited, 1) == ["first"]
    await alice.send(room_id, "!replybot last")
    assert (await people.replies(alice, room_id, 6))[5:] == ["last"]


async def test_pending_invitation_is_not_forgotten_by_a_kill_in_the_first_start(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Killed while the first join hangs, the bot joins at the next start and lost nothing."""
    room_id = await people.room_with_bot(alice)
    invited = await alice.create_room(people.bot_id)
    with proxy.inject(faults.hold(asyncio.Event()), faults.JOIN) as hanging:
        await proxied_bot.run()

        async def hangs() -> bool:
            return hanging.happened > 0

        await eventually(hangs)
        await proxied_bot.kill()
    await alice.send(room_id, "!replybot meanwhile")
    await proxied_bot.start()
    await joined(people, alice, invited)
    assert await people.replies(alice, room_id, 1) == ["meanwhile"]


async def test_command_sent_while_the_join_hangs_is_answered(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """What is said between invitation and join counts, though polls for other rooms pass it by."""
    busy = await people.room_with_bot(alice)
    await proxied_bot.run()
    until = asyncio.Event()
    with proxy.inject(faults.hold(until), faults.JOIN) as hanging:
        invited = await alice.create_room(people.bot_id)
        await alice.send(busy, "!replybot 0")
        await people.replies(alice, busy, 1)
        await alice.send(invited, "!replybot early")
        for n in (1, 2):
            await alice.send(busy, f"!replybot {n}")
            await people.replies(alice, busy, n + 1)
        assert hanging.happened
        until.set()
        await joined(people, alice, invited)
    await alice.send(invited, "!replybot late")
    assert await people.replies(alice, invited, 2) == ["early", "late"]


async def test_join_is_repeated_after_an_error(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """A 502 and a lost answer do not cost the room."""
    await proxied_bot.run()
    with (
        proxy.inject(faults.bad_gateway, faults.JOIN, times=1) as refused,
        proxy.inject(faults.cut_after, faults.JOIN, times=1) as lost,
    ):
        room_id = await alice.create_room(people.bot_id)
        await alice.send(room_id, "!replybot hello")
        assert await people.replies(alice, room_id, 1) == ["hello"]
        assert refused.happened == lost.happened == 1


async def test_overview_that_never_comes_does_not_hold_the_position_back(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """If the homeserver fails on a sync without `since` for too long, next_batch moves on."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    await proxied_bot.stop()
    proxied_bot.script = fork(proxied_bot.directory, PATIENCE=2, MAX_BACKOFF=1)
    path = proxied_bot.state / "next_batch"
    before = path.read_text()
    with proxy.inject(faults.internal_error, r"/sync\?(?!.*since=)") as refused:
        await proxied_bot.start()
        await alice.send(room_id, "!replybot hello")
        assert await people.replies(alice, room_id, 1) == ["hello"]

        async def moved() -> bool:
            return path.read_text() != before

        await eventually(moved)
        assert refused.happened
