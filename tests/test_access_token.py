"""An access token that is refused is replaced with the password, sparingly; a given one is not."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import support.proxy as faults
from aiohttp import web
from conftest import People, new_people
from support.bot import Bot, fork, new_bot
from support.homeserver import PASSWORD, User, running_homeserver
from support.proxy import LOGIN, POLL, SEND, Fault, Proxy, running_proxy

REFUSED = {"errcode": "M_UNKNOWN_TOKEN", "error": "Unknown access token"}
SOFT_LOGOUT = {**REFUSED, "soft_logout": True}


async def revoke(people: People, access_token: str) -> None:
    """Have the homeserver forget an access token."""
    await people.homeserver.request("POST", "/logout", {}, access_token=access_token)


async def test_token_revoked_while_running_is_replaced_on_the_same_device(
    people: People, alice: User, bot: Bot
) -> None:
    """The bot logs in again with the password, and what was said meanwhile is answered."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    session = bot.session
    await alice.send(room_id, "!replybot before")
    await people.replies(alice, room_id, 1)
    await revoke(people, session["access_token"])
    await alice.send(room_id, "!replybot after")
    assert await people.replies(alice, room_id, 2) == ["before", "after"]
    assert bot.session["access_token"] != session["access_token"]
    assert bot.session["device_id"] == session["device_id"]
    assert await people.account.devices() == {people.account.device_id, session["device_id"]}


async def test_token_revoked_while_stopped_is_replaced_on_the_same_device(
    people: People, alice: User, bot: Bot
) -> None:
    """The start with a dead token logs in again, and what was said meanwhile is answered."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    assert await bot.stop() == 0
    session = bot.session
    await revoke(people, session["access_token"])
    await alice.send(room_id, "!replybot meanwhile")
    await bot.start()
    assert await people.replies(alice, room_id, 1) == ["meanwhile"]
    assert bot.session["access_token"] != session["access_token"]
    assert bot.session["device_id"] == session["device_id"]
    assert await people.account.devices() == {people.account.device_id, session["device_id"]}


async def test_session_that_expires_is_renewed_on_the_same_device() -> None:
    """Soft logouts by a homeserver with a short session lifetime cost nothing."""
    async with running_homeserver({"session_lifetime": "5s"}) as homeserver:
        people = await new_people(homeserver)
        alice = await people.user("alice")
        room_id = await people.room_with_bot(alice)
        async with new_bot(homeserver.url, MATRIX_USER=people.bot_id) as bot:
            bot.script = fork(bot.directory, SYNC_TIMEOUT=2000)
            await bot.run()
            device_id = bot.session["device_id"]
            await alice.send(room_id, "!replybot before")
            await bot.logs("logging in again", times=2)
            alice = await homeserver.log_in(alice.user_id)
            await alice.send(room_id, "!replybot after")
            assert await people.replies(alice, room_id, 2) == ["before", "after"]
            assert bot.session["device_id"] == device_id


@pytest.mark.parametrize("pattern", [POLL, SEND])
async def test_soft_logout_costs_at_most_one_login(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, pattern: str
) -> None:
    """Told so once, in a poll or a send, the bot goes on, on the same device."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    device_id = proxied_bot.session["device_id"]
    with proxy.inject(faults.answer(401, SOFT_LOGOUT), pattern, times=1) as soft_logout:
        for n in range(3):
            await alice.send(room_id, f"!replybot {n}")
        assert await people.replies(alice, room_id, 3) == ["0", "1", "2"]
        assert soft_logout.happened == 1
    assert proxy.count(LOGIN) <= 2
    assert proxied_bot.session["device_id"] == device_id


def refusal_of(access_token: str, body: object) -> Fault:
    """Requests with this access token are refused, some of them late."""
    chance = random.Random(1)

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {access_token}":
            return await proxy.forward(request)
        await asyncio.sleep(chance.uniform(0, 1))
        return web.json_response(body, status=401)

    return fault


async def test_login_does_not_carry_the_refused_token(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Homeservers of Conduit's family refuse any request with a token they do not know."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    with proxy.inject(refusal_of(proxied_bot.session["access_token"], REFUSED)) as refused:
        await alice.send(room_id, "!replybot hello")
        assert await people.replies(alice, room_id, 1) == ["hello"]
        assert refused.happened
    assert proxy.count(LOGIN) == 2


async def not_found(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """404 with HTML, as from a reverse proxy that does not know its homeserver yet."""
    return web.Response(status=404, text="<html>404 page not found</html>")


@pytest.mark.parametrize("body", [REFUSED, SOFT_LOGOUT])
async def test_many_requests_refused_at_once_cost_one_login(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, body: object
) -> None:
    """A refusal that comes after the next login is not taken for one of the new token."""
    rooms = [await people.room_with_bot(alice) for _ in range(10)]
    await proxied_bot.run()
    refusal = refusal_of(proxied_bot.session["access_token"], body)
    with proxy.inject(refusal, f"{POLL}|{SEND}") as refused:
        await asyncio.gather(*[alice.send(room_id, "!replybot hello") for room_id in rooms])
        for room_id in rooms:
            assert await people.replies(alice, room_id, 1) == ["hello"]
        assert refused.happened >= 10
    assert proxy.count(LOGIN) == 2


@pytest.mark.parametrize("fault", [faults.not_json, faults.empty_object, not_found])
async def test_login_outlives_answers_that_are_not_of_a_homeserver(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, fault: Fault
) -> None:
    """A bot that ran before waits for its homeserver, whatever answers in its place meanwhile."""
    room_id = await people.room_with_bot(alice)
    proxied_bot.script = fork(proxied_bot.directory, MAX_BACKOFF=0.25)
    await proxied_bot.run()
    with proxy.inject(fault, LOGIN, times=8) as confused:
        await revoke(people, proxied_bot.session["access_token"])
        await alice.send(room_id, "!replybot hello")
        assert await people.replies(alice, room_id, 1) == ["hello"]
        assert confused.happened == 8


async def test_logins_are_spaced(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """While each new token is refused too, there are so many logins in a window and no more."""
    room_id = await people.room_with_bot(alice)
    proxied_bot.script = fork(proxied_bot.directory, SYNC_TIMEOUT=2000, LOGINS=2, LOGIN_WINDOW=5)
    started = time.monotonic()
    with proxy.inject(faults.answer(401, REFUSED), POLL, times=5) as refused:
        await proxied_bot.start()
        await proxied_bot.logs("logging in again", times=5)
        await proxied_bot.ready()
        await alice.send(room_id, "!replybot hello")
        assert await people.replies(alice, room_id, 1) == ["hello"]
        assert refused.happened == 5
    # Six logins, two in any five seconds.
    assert proxy.count(LOGIN) == 6
    assert time.monotonic() - started > 10


async def test_password_changed_while_running_ends_it(people: People, bot: Bot) -> None:
    """The exit status is 77, and one line says what to check."""
    await bot.run()
    identifier = {"type": "m.id.user", "user": people.bot_id}
    auth = {"type": "m.login.password", "identifier": identifier, "password": PASSWORD}
    change = {"new_password": "another", "logout_devices": True, "auth": auth}
    await people.account.request("POST", "/account/password", change)
    assert await bot.wait(30) == 77
    assert complaints(bot) == 1
    assert "check MATRIX_USER and MATRIX_PASSWORD" in bot.log


def complaints(bot: Bot) -> int:
    """Count the lines that say why the bot ended; there must be no traceback beside them."""
    assert "Traceback" not in bot.log
    return sum(line.startswith("echobot: ") for line in bot.log.splitlines())


@asynccontextmanager
async def bot_with_token(people: People) -> AsyncIterator[tuple[Bot, str]]:
    """Make a bot with MATRIX_ACCESS_TOKEN, and a password that is not to be used; yield both."""
    access_token = (await people.homeserver.log_in(people.bot_id)).access_token
    async with new_bot(
        people.homeserver.url, MATRIX_USER=people.bot_id, MATRIX_ACCESS_TOKEN=access_token
    ) as bot:
        yield bot, access_token


async def test_given_token_revoked_while_running_ends_it(people: People) -> None:
    """With MATRIX_ACCESS_TOKEN the exit status is 77, and one line says what to check."""
    async with bot_with_token(people) as (bot, access_token):
        await bot.run()
        await revoke(people, access_token)
        assert await bot.wait(60) == 77
        assert complaints(bot) == 1
        assert "check MATRIX_USER and MATRIX_ACCESS_TOKEN" in bot.log


async def test_given_token_revoked_while_stopped_ends_the_start(people: People) -> None:
    """With MATRIX_ACCESS_TOKEN the exit status is 77, and one line says what to check."""
    async with bot_with_token(people) as (bot, access_token):
        await revoke(people, access_token)
        await bot.start()
        assert await bot.wait(30) == 77
        assert complaints(bot) == 1
        assert "check MATRIX_USER and MATRIX_ACCESS_TOKEN" in bot.log


async def test_given_token_is_not_written_anywhere(people: People, alice: User) -> None:
    """Neither the state directory nor the log has it, at any level, and no device is added."""
    room_id = await people.room_with_bot(alice)
    async with bot_with_token(people) as (bot, access_token):
        bot.environment["LOG_LEVEL"] = "DEBUG"
        devices = await people.account.devices()
        await bot.run()
        await alice.send(room_id, "!replybot hello")
        assert await people.replies(alice, room_id, 1) == ["hello"]
        assert await bot.stop() == 0
        assert (bot.state / "session.json").exists()
        for file in bot.directory.rglob("*"):
            assert file.is_dir() or access_token.encode() not in file.read_bytes()
        assert await people.account.devices() == devices


async def test_twelve_restarts_make_one_login() -> None:
    """Under Synapse's own limits for logins, kills and stops in a row never meet them."""
    async with running_homeserver(drop=("rc_login",)) as homeserver:
        people = await new_people(homeserver)
        alice = await people.user("alice")
        room_id = await people.room_with_bot(alice)
        async with (
            running_proxy(homeserver.url) as proxy,
            new_bot(proxy.url, MATRIX_USER=people.bot_id) as bot,
        ):
            for n in range(12):
                await bot.start()
                await bot.ready(times=n + 1)
                await alice.send(room_id, f"!replybot {n}")
                await (bot.stop if n % 2 else bot.kill)()
            await bot.start()
            assert await people.replies(alice, room_id, 12) == [str(n) for n in range(12)]
            assert proxy.count(LOGIN) == 1
            assert "HTTP 429" not in bot.log
