"""A network that goes quiet without a reset is noticed by deadlines, and mended."""

from __future__ import annotations

import pytest
import support.proxy as faults
from aiohttp import web
from conftest import People
from support.bot import Bot, eventually, fork
from support.homeserver import User
from support.proxy import ALL, POLL, SEND, Fault, Injection, Proxy


async def stall(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """The homeserver's answer begins and does not go on."""
    answer = await proxy.forward(request)
    assert isinstance(answer.body, bytes)
    part = web.StreamResponse(status=answer.status, headers=answer.headers)
    part.content_length = len(answer.body)
    await part.prepare(request)
    await part.write(answer.body[:1])
    return await faults.silence(proxy, request)


async def struck(injection: Injection, times: int = 1) -> None:
    """Wait until a fault has happened so many times."""

    async def happened() -> bool:
        return injection.happened >= times

    await eventually(happened, what="the fault")


async def started(people: People, alice: User, bot: Bot) -> str:
    """Start the bot with short deadlines and have it answer once; return the ID of the room."""
    # nio waits for a poll 15 s longer than the homeserver is told to hold it.
    bot.script = fork(bot.directory, SYNC_TIMEOUT=2000, REQUEST_TIMEOUT=2)
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await alice.send(room_id, "!replybot before")
    await people.replies(alice, room_id, 1)
    return room_id


@pytest.mark.parametrize("quiet", [faults.silence, stall])
async def test_silence_in_the_long_poll_ends_with_its_deadline(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, quiet: Fault
) -> None:
    """What is said meanwhile is answered with the next poll."""
    room_id = await started(people, alice, proxied_bot)
    with proxy.inject(quiet, POLL, times=1) as silence:
        await struck(silence)
        await alice.send(room_id, "!replybot meanwhile")
        assert await people.replies(alice, room_id, 2, seconds=60) == ["before", "meanwhile"]
    assert "no answer in time" in proxied_bot.log


@pytest.mark.parametrize("quiet", [faults.silence, stall])
async def test_silence_in_a_send_ends_with_its_deadline(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, quiet: Fault
) -> None:
    """The reply is sent again, and once to see, whether or not the homeserver had it already."""
    room_id = await started(people, alice, proxied_bot)
    with proxy.inject(quiet, SEND, times=2) as silence:
        await alice.send(room_id, "!replybot first")
        await alice.send(room_id, "!replybot second")
        replies = await people.replies(alice, room_id, 3, seconds=60)
    assert replies == ["before", "first", "second"]
    assert silence.happened == 2
    assert "no answer in time" in proxied_bot.log


async def test_silence_of_the_whole_network_is_mended_once_it_ends(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Open connections never speak again; what was said meanwhile is answered over new ones."""
    room_id = await started(people, alice, proxied_bot)
    with proxy.inject(faults.silence, ALL) as silence:
        await alice.send(room_id, "!replybot first")
        await struck(silence, times=3)
        await alice.send(room_id, "!replybot second")
    replies = await people.replies(alice, room_id, 3, seconds=60)
    assert replies == ["before", "first", "second"]
