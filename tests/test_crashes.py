"""Killed or stopped at any moment, the bot loses nothing and doubles nothing."""

import asyncio
import random
import re
import signal
import time

import pytest
import support.proxy as faults
from support.bot import Bot, eventually, new_bot
from support.people import People, Room
from support.proxy import LOGIN, MESSAGES, SEND, Proxy
from test_misbehaving_rooms import sends_to


@pytest.mark.others
async def test_kills_at_random_moments(people: People, proxied_bot: Bot, proxy: Proxy) -> None:
    """SIGKILLs under bursts in two rooms: all answered once, in order, after a single login."""
    rooms = [await people.room() for _ in range(2)]
    sent = [0, 0]
    # Dendrite takes a send twice if it is repeated within the tenth of a second that it takes.
    proxied_bot.may_be_forked = False
    await proxied_bot.run()
    done = asyncio.Event()

    async def talk(number: int) -> None:
        chance = random.Random(number)
        while not done.is_set():
            for _ in range(chance.choice([1, 1, 30])):
                await rooms[number].command(sent[number])
                sent[number] += 1
            await asyncio.sleep(chance.uniform(0, 0.5))

    talkers = [asyncio.create_task(talk(number)) for number in range(2)]
    chance = random.Random(7)
    for _ in range(12):
        await asyncio.sleep(chance.uniform(0.5, 2.5))
        await proxied_bot.kill()
        await proxied_bot.start()
    done.set()
    await asyncio.gather(*talkers)
    for room, count in zip(rooms, sent, strict=True):
        assert await room.replies(count) == [str(n) for n in range(count)]
    assert proxy.count(LOGIN) == 1


@pytest.mark.others
async def test_homeserver_stopped_killed_and_back(people: People, room: Room, bot: Bot) -> None:
    """The bot outlives its homeserver and answers what was sent before and after."""
    await bot.run()
    for n, end in enumerate((people.homeserver.stop, people.homeserver.kill)):
        await room.command(*range(21 * n, 21 * n + 20))
        await end()
        await people.homeserver.start()
        await room.command(21 * n + 20)
    expected = [str(n) for n in range(42)]
    if people.homeserver.name == "Dendrite":  # It forgets transaction IDs, as the README says.
        await eventually(lambda: said_once_or_more(room, expected))
    else:
        assert await room.replies(42) == expected
    assert bot.running


async def said_once_or_more(room: Room, expected: list[str]) -> bool:
    """Tell if the bot has said all that, in order, repetitions left out."""
    return list(dict.fromkeys(await room.bodies())) == expected


@pytest.mark.others
@pytest.mark.parametrize("is_logged_out", [False, True])
async def test_crash_between_send_and_answer_does_not_double_the_reply(
    people: People, room: Room, proxied_bot: Bot, proxy: Proxy, is_logged_out: bool
) -> None:
    """Killed while the homeserver's answer to a send is on its way, and logged out while down."""
    await proxied_bot.run()
    with proxy.inject(faults.done_but_silent, SEND, times=1) as lost:
        await room.command("first")
        assert await room.replies(1) == ["first"]
        await proxied_bot.kill()
        assert lost.happened == 1
    if is_logged_out:
        await people.homeserver.revoke(proxied_bot.session["access_token"])
    await proxied_bot.start()
    await room.command("second")
    assert await room.replies(2) == ["first", "second"]
    # The sync after the start tells that the first is answered; if not yet, it is sent again.
    assert 2 <= proxy.count(SEND) <= 3 + is_logged_out
    assert proxy.count(LOGIN) == 1 + is_logged_out


@pytest.mark.others
async def test_crash_between_reply_and_save_does_not_double_the_reply(
    room: Room, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Killed after replies, and started from the position before them: they are recognised."""
    await proxied_bot.run()
    before = proxied_bot.next_batch
    await room.command(0, 1, 2)
    await room.replies(3)
    await proxied_bot.kill()
    (proxied_bot.state / "next_batch").write_text(before)
    await proxied_bot.start()
    await room.command(3)
    assert await room.replies(4) == ["0", "1", "2", "3"]
    assert proxy.count(SEND) == 4


@pytest.mark.others
async def test_crash_while_one_room_hangs(
    people: People, room: Room, proxied_bot: Bot, proxy: Proxy
) -> None:
    """However far another room has come: after a kill only the one that hung is read again."""
    other = await people.room()
    await proxied_bot.run()
    await proxied_bot.kill()
    proxy.timeline_limit = 1
    await room.command("hangs")
    await other.command(*range(25))
    with proxy.inject(faults.hold(asyncio.Event().wait), sends_to(room.room_id)) as hanging:
        await proxied_bot.start()
        await hanging.happens()
        for n in range(25, 30):
            await other.command(n)
            assert await other.replies(n + 1) == [str(m) for m in range(n + 1)]
        await eventually(lambda: set(proxied_bot.unfinished) == {room.room_id})
        await proxied_bot.kill()
    proxy.timeline_limit, before = None, len(proxy.requests)
    await proxied_bot.start()
    assert await room.replies(1) == ["hangs"]
    read = [request for request in proxy.requests[before:] if re.search(MESSAGES, request)]
    assert read
    assert all(room.room_id[1:] in request for request in read), "another room was read again"
    await other.command(30)
    assert await other.replies(31) == [str(m) for m in range(31)]


async def stops(bot: Bot, number: int = signal.SIGTERM) -> None:
    """Send the signal; assert that the bot ends within a second, with 0 and without a traceback."""
    started = time.monotonic()
    assert await bot.send_signal(number) == 0
    assert time.monotonic() - started < 1
    assert "Traceback" not in bot.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_bot_stops_within_a_second(room: Room, bot: Bot, number: int) -> None:
    """The long poll is not waited for, and the exit status is 0."""
    await bot.run()
    await room.command("hello")
    await room.replies(1)
    await bot.logs("Answered")
    await stops(bot, number)


@pytest.mark.others
async def test_stop_amid_a_burst_loses_and_doubles_nothing(room: Room, bot: Bot) -> None:
    """Stopped five times while 100 commands come in, it answers each once and in order."""
    bot.may_be_forked = False  # as in test_kills_at_random_moments
    await bot.run()
    sending = asyncio.create_task(room.command(*range(100)))
    for n in range(5):
        await room.replies(n * 10)
        await bot.logs("Logged in as", times=n + 1)
        await stops(bot)
        await bot.start()
    await sending
    assert await room.replies(100) == [str(n) for n in range(100)]


async def test_stop_while_the_homeserver_is_away() -> None:
    """A bot that waits for its homeserver to come up stops at once too."""
    async with new_bot("http://127.0.0.1:9") as bot:
        await bot.start()
        await bot.logs("Trouble with the login at http://127.0.0.1:9")
        await stops(bot)
