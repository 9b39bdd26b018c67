"""A network that goes quiet without a reset is noticed by deadlines, and mended."""

import pytest
import support.proxy as faults
from aiohttp import web
from support.bot import Bot
from support.people import Room
from support.proxy import ALL, LOGIN, POLL, SEND, Fault, Proxy


async def stall(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """The homeserver's answer begins and does not go on."""
    answer = await proxy.forward(request)
    assert isinstance(answer.body, bytes)
    part = web.StreamResponse(status=answer.status, headers=answer.headers)
    part.content_length = len(answer.body)
    await part.prepare(request)
    await part.write(answer.body[:1])
    return await faults.silence(proxy, request)


@pytest.mark.parametrize("quiet", [faults.silence, stall])
async def test_silence_ends_with_a_deadline(
    room: Room, quick_bot: Bot, proxy: Proxy, quiet: Fault
) -> None:
    """Of a long poll or of a send, whether or not the homeserver had the reply already."""
    await quick_bot.run()
    with proxy.inject(quiet, POLL, times=1) as silence:
        await silence.happens()
        await room.command("meanwhile")
        assert await room.replies(1) == ["meanwhile"]
    assert "Trouble with the sync: Timeout" in quick_bot.log
    with proxy.inject(quiet, SEND, times=2) as silence:
        await room.command("first", "second")
        assert await room.replies(3) == ["meanwhile", "first", "second"]
        await silence.happens(times=2)
    assert ": Timeout on reading" in quick_bot.log


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


async def test_silence_at_the_login_ends_with_its_deadline(quick_bot: Bot, proxy: Proxy) -> None:
    """The line says that no answer came, and from where; once one comes, the bot logs in."""
    with proxy.inject(faults.silence, LOGIN) as silence:
        await quick_bot.start()
        await quick_bot.logs(f"Trouble with the login at {proxy.url}: Timeout")
        await silence.happens()
    await quick_bot.ready()
