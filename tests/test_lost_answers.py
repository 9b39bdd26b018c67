"""An answer that is lost, late or broken costs nothing and doubles nothing."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import support.proxy as faults
from aiohttp import web
from conftest import People
from support.bot import Bot, fork
from support.homeserver import User
from support.proxy import EVERY_FAULT, LOGIN, MESSAGES, POLL, SEND, Proxy


async def done_but_silent(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """The homeserver does what it was asked, but its answer never comes."""
    await proxy.forward(request)
    return await faults.silence(proxy, request)


@pytest.mark.parametrize("name", EVERY_FAULT)
async def test_any_fault_on_any_request_costs_and_doubles_nothing(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, name: str
) -> None:
    """Once each in a login, a sync, a page of messages and a send: all is answered once."""
    proxied_bot.script = fork(proxied_bot.directory, SYNC_TIMEOUT=2000, REQUEST_TIMEOUT=2)
    with ExitStack() as stack:
        injections = [
            stack.enter_context(proxy.inject(EVERY_FAULT[name], pattern, times=1))
            for pattern in (LOGIN, POLL, MESSAGES, SEND)
        ]
        await proxied_bot.run()
        room_id = await alice.create_room(people.bot_id)
        # A room just joined is read from pages of messages, then from sync answers.
        await alice.send(room_id, "!replybot first")
        await people.replies(alice, room_id, 1, seconds=60)
        await alice.send(room_id, "!replybot second")
        assert await people.replies(alice, room_id, 2, seconds=60) == ["first", "second"]
        assert [injection.happened for injection in injections] == [1, 1, 1, 1]
    assert len(await people.account.devices()) == 2


async def test_lost_answer_to_a_send_does_not_double_the_reply(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Three times in a row the homeserver has the reply and the bot does not hear of it."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    with proxy.inject(faults.cut_after, SEND, times=3) as lost:
        await alice.send(room_id, "!replybot first")
        await alice.send(room_id, "!replybot second")
        assert await people.replies(alice, room_id, 2) == ["first", "second"]
    assert lost.happened == 3
    assert proxy.count(SEND) == 5


async def test_crash_between_send_and_answer_does_not_double_the_reply(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Killed while the homeserver's answer to a send is on its way."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    with proxy.inject(done_but_silent, SEND, times=1) as lost:
        await alice.send(room_id, "!replybot first")
        assert await people.replies(alice, room_id, 1) == ["first"]
        await proxied_bot.kill()
        assert lost.happened == 1
    await proxied_bot.start()
    await alice.send(room_id, "!replybot second")
    assert await people.replies(alice, room_id, 2) == ["first", "second"]
    assert proxy.count(SEND) == 3


async def test_crash_between_reply_and_save_does_not_double_the_reply(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Killed after replies, and started from the position before them."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    before = (proxied_bot.state / "next_batch").read_bytes()
    for n in range(3):
        await alice.send(room_id, f"!replybot {n}")
    await people.replies(alice, room_id, 3)
    await proxied_bot.kill()
    (proxied_bot.state / "next_batch").write_bytes(before)
    await proxied_bot.start()
    await alice.send(room_id, "!replybot 3")
    assert await people.replies(alice, room_id, 4) == ["0", "1", "2", "3"]
    assert proxy.count(SEND) == 7


async def test_login_between_lost_answer_and_repetition_does_not_double_the_reply(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """While the answer to a send is waited for in vain, the access token is replaced."""
    room_id = await people.room_with_bot(alice)
    proxied_bot.script = fork(proxied_bot.directory, SYNC_TIMEOUT=2000, REQUEST_TIMEOUT=5)
    await proxied_bot.run()
    refusal = {"errcode": "M_UNKNOWN_TOKEN", "error": "Unknown access token"}
    with proxy.inject(done_but_silent, SEND, times=1) as lost:
        await alice.send(room_id, "!replybot first")
        await people.replies(alice, room_id, 1)
        with proxy.inject(faults.answer(401, refusal), POLL, times=1) as refused:
            await proxied_bot.logs("logging in again")
        assert proxy.count(SEND) == 1
        await alice.send(room_id, "!replybot second")
        assert await people.replies(alice, room_id, 2) == ["first", "second"]
        assert lost.happened == refused.happened == 1
    assert proxy.count(LOGIN) == 2
    assert proxy.count(SEND) == 3


async def test_crash_and_logout_between_send_and_answer_do_not_double_the_reply(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Killed before the answer to a send, logged out while it is down."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    with proxy.inject(done_but_silent, SEND, times=1) as lost:
        await alice.send(room_id, "!replybot first")
        await people.replies(alice, room_id, 1)
        await proxied_bot.kill()
        assert lost.happened == 1
    await people.homeserver.request(
        "POST", "/logout", {}, access_token=proxied_bot.session["access_token"]
    )
    await proxied_bot.start()
    await alice.send(room_id, "!replybot second")
    assert await people.replies(alice, room_id, 2) == ["first", "second"]
    assert proxy.count(LOGIN) == 2
