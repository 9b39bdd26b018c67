"""An answer that is lost, late or broken, and silence, cost nothing and double nothing."""

from contextlib import ExitStack

import pytest
import support.proxy as faults
from support.bot import Bot
from support.people import People, Room
from support.proxy import ALL, EVERY_FAULT, JOIN, LOGIN, MESSAGES, POLL, REFUSED, SEND, Proxy


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
    assert len(await people.account.devices()) == 2


async def test_login_between_lost_answer_and_repetition_does_not_double_the_reply(
    room: Room, quick_bot: Bot, proxy: Proxy
) -> None:
    """While the answer to a send is waited for in vain, the access token is replaced."""
    await quick_bot.run()
    with proxy.inject(faults.done_but_silent, SEND, times=1) as lost:
        await room.command("first")
        await room.replies(1)
        with proxy.inject(faults.answer(401, REFUSED), POLL, times=1) as refused:
            await quick_bot.logs("Trouble with the sync: HTTP 401")
        await room.command("second")
        assert await room.replies(2) == ["first", "second"]
        assert lost.happened == refused.happened == 1
    assert proxy.count(LOGIN) == 2
    assert proxy.count(SEND) == 3


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
