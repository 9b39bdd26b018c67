"""An answer that is lost, late or broken, and silence, cost nothing and double nothing."""

import time
from contextlib import ExitStack

import pytest
import support.proxy as faults
from support.bot import Bot
from support.people import People, Room
from support.proxy import ALL, EVERY_FAULT, JOIN, LOGIN, MESSAGES, POLL, SEND, Fault, Proxy
from support.scripted import field_of


@pytest.mark.others
@pytest.mark.speed(60)
@pytest.mark.parametrize("name", EVERY_FAULT)
async def test_any_fault_on_any_request_costs_and_doubles_nothing(
    people: People, quick_bot: Bot, proxy: Proxy, name: str
) -> None:
    """Once each in a login, a sync, a join, a page of messages and a send: all is answered once."""
    with ExitStack() as stack:
        injections = [
            stack.enter_context(proxy.inject(EVERY_FAULT[name], pattern, times=1))
            for pattern in (LOGIN, POLL, JOIN, MESSAGES, SEND)
        ]
        await quick_bot.run()
        # A room just joined is read from pages of messages, then from sync answers.
        room = await people.invite()
        await room.command("first")
        await room.replies(1)
        await room.command("second")
        assert await room.replies(2) == ["first", "second"]
        assert all(injection.happened == 1 for injection in injections)
    assert "ERROR" not in quick_bot.log, "the position was given up"
    assert len(await people.account.devices()) == 2


@pytest.mark.others
@pytest.mark.speed(60)
async def test_silence_of_the_whole_network_is_mended_once_it_ends(
    room: Room, quick_bot: Bot, proxy: Proxy
) -> None:
    """Open connections never speak again; what was said meanwhile is answered over new ones."""
    await quick_bot.run()
    with proxy.inject(faults.silence, ALL) as silence:
        await room.command("first")
        await silence.happens(times=3)
        await room.command("second")
    assert await room.replies(2) == ["first", "second"]
    assert "Trouble with the sync: Timeout" in quick_bot.log


@pytest.mark.parametrize(
    "fault", [faults.rate_limited(2000), faults.rate_limited_by_header(2)], ids=["body", "header"]
)
@pytest.mark.parametrize("pattern", [SEND, POLL], ids=["send", "sync"])
async def test_429_is_waited_out_as_told(
    room: Room, proxied_bot: Bot, proxy: Proxy, fault: Fault, pattern: str
) -> None:
    """Told to wait, in the body or only by Retry-After, the bot asks again then and not before."""
    await proxied_bot.run()
    with proxy.inject(fault, pattern, times=1) as limited:
        if pattern == POLL:
            await room.say("this ends the poll before")
            await limited.happens()
        started = time.monotonic()
        await room.command("hello")
        assert await room.replies(1) == ["hello"]
        assert 1.9 < time.monotonic() - started < 5
        assert limited.happened == 1
        assert not proxy.count(MESSAGES), "what was refused was looked for"
    assert "Gave up" not in proxied_bot.log


async def test_failures_that_come_late_are_repeated_soon() -> None:
    """Of ten sends that end with 504 after 10 s, none waits long: that was pause enough."""
    async with field_of(speed=20) as field:
        room = field.server.room()
        await field.bot.run()
        late = faults.after(10, faults.answer(504, "<html>504 Gateway Time-out</html>"))
        with field.proxy.inject(late, SEND, times=10) as failing:
            began = field.now()
            room.command("hello")
            await room.answers("hello")
            assert failing.happened == 10
            assert 95 < field.now() - began < 140
