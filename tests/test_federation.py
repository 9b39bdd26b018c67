"""What is said on another homeserver counts as much, whenever and however it comes to the bot's."""

import asyncio

import pytest
import support.proxy as faults
from support.bot import Bot
from support.federation import FarPeople, FarRoom, Federation, arrives
from support.homeserver import Homeserver
from support.people import Room
from support.proxy import Proxy

BACKFILL = "GET .*/backfill/"  # a homeserver asks another one for what is missing


@pytest.fixture(scope="session")
def homeserver(federation: Federation) -> Homeserver:
    """The bot's."""
    return federation.near.homeserver


@pytest.fixture
async def people(federation: Federation) -> FarPeople:
    """An account for the bot and people on both homeservers."""
    return await federation.new_people()


@pytest.mark.long
async def test_outage_between_homeservers_costs_nothing(
    federation: Federation, people: FarPeople, bot: Bot
) -> None:
    """30 commands said during an outage, with and without others around it: all answered once.

    What comes after it is the newest event and ten before; the others have to be asked for.
    """
    await bot.run()
    quiet, busy = [await people.far_room() for _ in range(2)]
    await busy.command(*range(10))
    async with federation.cut_off() as (cut, _):
        for room in (quiet, busy):
            await room.command(*range(10, 40))
        await cut.happens()
        asked = federation.far.front.count(BACKFILL)
    await busy.command(*range(40, 50))
    assert await quiet.replies(30) == [str(n) for n in range(10, 40)]
    assert await busy.replies(50) == [str(n) for n in range(50)]
    assert federation.far.front.count(BACKFILL) > asked


async def test_invitation_from_another_homeserver_while_down(people: FarPeople, bot: Bot) -> None:
    """Three commands before the bot is back are answered, what precedes the invitation is not."""
    await bot.run()
    await bot.stop()
    room = FarRoom(await people.bob.create_room(), people.bob, people.bot_id, people.account)
    await room.command("history")
    await people.bob.invite(room.room_id, people.bot_id)
    await room.command(*range(3))
    await bot.start()
    await room.bot_is("join")
    assert await room.replies(3) == ["0", "1", "2"]
    await room.command(3)
    assert await room.replies(4) == ["0", "1", "2", "3"]


async def test_outage_in_a_room_that_goes_on_on_both_sides(
    federation: Federation, people: FarPeople, bot: Bot
) -> None:
    """What comes late has its place among what is answered already: it is found there."""
    room, far = await people.shared_room()
    await bot.run()
    async with federation.cut_off() as (cut, _):
        await far.command(*(f"far {n}" for n in range(30)))
        await room.command(*range(15))
        replies = [str(n) for n in range(15)]
        assert await room.replies(15) == replies
        await cut.happens()
    assert await room.replies(45) == [*replies, *(f"far {n}" for n in range(30))]


async def answers_and_saves(room: Room, bot: Bot, replies: int = 1) -> None:
    """Have one command answered, the last of so many, and a position saved that is past it."""
    position = bot.next_batch
    await room.command("before")
    await room.replies(replies)
    await bot.saves(other_than=position)
    position = bot.next_batch
    await room.say("no command")
    await bot.saves(other_than=position)


async def test_kill_amid_what_is_read_back_after_an_outage(
    federation: Federation, people: FarPeople, proxied_bot: Bot, proxy: Proxy
) -> None:
    """What was fetched from the other homeserver for a bot that was killed is new for the next."""
    room = await people.far_room()
    await proxied_bot.run()
    await answers_and_saves(room, proxied_bot)
    with proxy.inject(faults.silence, faults.SEND) as sends:
        async with federation.cut_off() as (cut, _):
            await room.command(*range(30))
            await cut.happens()
        await sends.happens()
        await proxied_bot.kill()
    await proxied_bot.start()
    assert await room.replies(31) == ["before", *(str(n) for n in range(30))]


async def test_somebody_else_reads_back_first_after_an_outage(
    federation: Federation, people: FarPeople, bot: Bot
) -> None:
    """What was fetched from the other homeserver for them is new for the bot."""
    room = await room_of_all(people)
    await bot.run()
    await answers_and_saves(room, bot)
    await bot.kill()
    await alice_reads_back(federation, people, room)
    await bot.start()
    assert await room.replies(31) == ["before", *(str(n) for n in range(5, 35))]


@pytest.mark.parametrize("is_killed", [False, True])
async def test_somebody_else_reads_back_while_a_room_hangs(
    federation: Federation, people: FarPeople, quick_bot: Bot, proxy: Proxy, is_killed: bool
) -> None:
    """What was fetched for them is new though it seems to be from before all that has no reply."""
    room = await room_of_all(people)
    await quick_bot.run()
    with proxy.inject(faults.silence, faults.SEND) as hanging:
        await room.command(*range(5))
        await hanging.happens()
        await alice_reads_back(federation, people, room)
        if is_killed:
            await quick_bot.kill()
    if is_killed:
        await quick_bot.start()
    assert await room.replies(35) == [str(n) for n in range(35)]


async def test_outage_in_a_downtime_where_only_chat_was_heard(
    federation: Federation, people: FarPeople, bot: Bot
) -> None:
    """What is fetched when the bot asks what it knew is none of that, though no reply tells so."""
    room = await people.far_room()
    await bot.run()
    position = bot.next_batch
    await arrives(people.account, room.room_id, await room.say("chat", "chat", "chat"))
    await bot.saves(other_than=position)
    await bot.kill()
    async with federation.cut_off() as (cut, _):
        newest = await room.command(*range(30))
        await cut.happens()
    await arrives(people.account, room.room_id, newest)
    await bot.start()
    assert await room.replies(30) == [str(n) for n in range(30)]


async def room_of_all(people: FarPeople) -> FarRoom:
    """Create a room of bob with the bot's account and alice in it."""
    room = await people.far_room()
    await people.bob.invite(room.room_id, people.alice.user_id)
    await people.alice.join(room.room_id)
    return room


async def alice_reads_back(federation: Federation, people: FarPeople, room: FarRoom) -> None:
    """Have bob say 30 commands in an outage, and alice's client fetch those that do not come."""
    async with federation.cut_off() as (cut, _):
        newest = await room.command(*range(5, 35))
        await cut.happens()
        asked = federation.far.front.count(BACKFILL)
    await arrives(people.alice, room.room_id, newest)
    await people.alice.request("GET", f"/rooms/{room.room_id}/messages", dir="b", limit=50)
    assert federation.far.front.count(BACKFILL) > asked


@pytest.mark.long
@pytest.mark.parametrize("answered_before", [0, 50])
async def test_event_that_came_late_is_found_below_newer_ones(
    federation: Federation, people: FarPeople, bot: Bot, answered_before: int
) -> None:
    """The newest event, whose place is below 107 of 125 others, is answered and hides none of them.

    It comes while the bot is down, which answered none yet, or was killed in their middle.
    """
    room, far = await people.shared_room()
    await bot.run()
    await bot.kill()
    await arrives(people.bob, room.room_id, await room.command(*range(18)))
    async with federation.cut_off() as (cut, _):
        late = await far.command("late")
        await room.command(*range(18, 125))
        if answered_before:
            await bot.start()
            await room.replies(answered_before)
            await bot.kill()
        await cut.happens()
    await arrives(people.account, room.room_id, late)
    if answered_before:
        await room.command(125)
    await bot.start()
    count = 125 + bool(answered_before)
    replies = await room.replies(count + 1)
    assert [reply for reply in replies if reply != "late"] == [str(n) for n in range(count)]
    assert replies.count("late") == 1


@pytest.mark.long
async def test_event_that_came_late_is_found_a_page_below_what_is_known(
    federation: Federation, people: FarPeople, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Its place is among the chat from before the gap, whose newest is met a page earlier."""
    room, far = await people.shared_room()
    proxy.timeline_limit = 10
    await proxied_bot.run()
    await arrives(people.bob, room.room_id, await room.say(*["chat"] * 3))
    async with federation.cut_off() as (cut, _):
        late = await far.command("late")
        await room.say(*["chat"] * 20)
        position = proxied_bot.next_batch
        await room.say("chat")
        await proxied_bot.saves(other_than=position)
        await proxied_bot.kill()
        await room.say(*["chat"] * 70)
        await cut.happens()
    await arrives(people.account, room.room_id, late)
    await room.say(*["chat"] * 15)  # The timeline has only the last of them.
    await proxied_bot.start()
    assert await room.replies(1) == ["late"]


@pytest.mark.parametrize("is_killed", [False, True])
async def test_room_joined_only_in_part_is_answered(
    federation: Federation, people: FarPeople, bot: Bot, is_killed: bool
) -> None:
    """What is said while the homeserver still asks for the room's members is answered by the end.

    Until then Synapse gives no older messages, and leaves the room out of ordinary syncs.
    """
    await bot.run()
    until = asyncio.Event()
    with federation.far.front.inject(faults.hold(until.wait), "/state_ids/") as held:
        room = await people.far_invite()
        await room.command("invited")
        await room.bot_is("join")
        await held.happens()
        await arrives(people.account, room.room_id, await room.command(*range(20)))
        if is_killed:
            await bot.kill()
            await bot.start()
            await bot.logs("Logged in as", times=2)
        await arrives(people.account, room.room_id, await room.command(20))
        until.set()
    assert await room.replies(22) == ["invited", *(str(n) for n in range(21))]
