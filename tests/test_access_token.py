"""An access token that is refused is replaced with the password, on the same device."""

import asyncio
import random

import pytest
import support.proxy as faults
from aiohttp import web
from support.bot import Bot
from support.homeserver import PASSWORD
from support.people import People, Room
from support.proxy import ALL, LOGIN, POLL, REFUSED, SEND, SOFT_LOGOUT, Fault, Proxy


@pytest.mark.others
@pytest.mark.parametrize("is_running", [True, False])
async def test_revoked_token_is_replaced_on_the_same_device(
    people: People, room: Room, bot: Bot, is_running: bool
) -> None:
    """The bot logs in again with the password, and what was said meanwhile is answered."""
    await bot.run()
    session = bot.session
    await room.command("before")
    await room.replies(1)
    if not is_running:
        assert await bot.stop() == 0
    await people.homeserver.revoke(session["access_token"])
    await room.command("after")
    if not is_running:
        await bot.start()
    assert await room.replies(2) == ["before", "after"]
    assert bot.session["access_token"] != session["access_token"]
    assert bot.session["device_id"] == session["device_id"]
    assert await people.account.devices() == {people.account.device_id, session["device_id"]}


def refusal_of(access_token: str, body: object) -> Fault:
    """Requests with this access token are refused, some of them late."""
    chance = random.Random(1)

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {access_token}":
            return await proxy.forward(request)
        await asyncio.sleep(chance.uniform(0, 1))
        return web.json_response(body, status=401)

    return fault


@pytest.mark.others
@pytest.mark.parametrize("body", [REFUSED, SOFT_LOGOUT])
# Homeservers of Conduit's family refuse any request with a token they do not know, even a login.
@pytest.mark.parametrize("pattern", [f"{POLL}|{SEND}", ALL], ids=["polls and sends", "all"])
async def test_many_requests_refused_at_once_cost_one_login(
    people: People, proxied_bot: Bot, proxy: Proxy, pattern: str, body: object
) -> None:
    """A refusal that comes after the next login is not taken for one of the new token."""
    rooms = [await people.room() for _ in range(10)]
    await proxied_bot.run()
    refusal = refusal_of(proxied_bot.session["access_token"], body)
    with proxy.inject(refusal, pattern) as refused:
        await asyncio.gather(*[room.command("hello") for room in rooms])
        for room in rooms:
            assert await room.replies(1) == ["hello"]
        assert refused.happened >= 10
    assert proxy.count(LOGIN) == 2


async def test_tokens_refused_one_after_the_other_cost_no_command(
    room: Room, quick_bot: Bot, proxy: Proxy
) -> None:
    """While each new token is refused too, there is one login for each and no command is lost."""
    with proxy.inject(faults.answer(401, REFUSED), POLL, times=5) as refused:
        await quick_bot.start()
        await refused.happens(times=5)
        await quick_bot.ready()
        await room.command("hello")
        assert await room.replies(1) == ["hello"]
    assert proxy.count(LOGIN) <= 6


@pytest.fixture
async def access_token(people: People, bot: Bot) -> str:
    """The bot's MATRIX_ACCESS_TOKEN; it has a password too, which is not to be used."""
    token = (await people.homeserver.log_in(people.bot_id)).access_token
    bot.environment["MATRIX_ACCESS_TOKEN"] = token
    return token


async def test_password_changed_while_running_ends_it(people: People, bot: Bot) -> None:
    """The exit status is 77, and one line says what to check."""
    await bot.run()
    identifier = {"type": "m.id.user", "user": people.bot_id}
    auth = {"type": "m.login.password", "identifier": identifier, "password": PASSWORD}
    change = {"new_password": "another", "logout_devices": True, "auth": auth}
    await people.account.request("POST", "/account/password", change)
    status, line = await bot.refused()
    assert status == 77
    assert "check MATRIX_USER and MATRIX_PASSWORD" in line


async def test_given_token_that_is_revoked_ends_it(
    people: People, bot: Bot, access_token: str
) -> None:
    """While it runs and at the next start: 77, and one line says what to check."""
    await bot.run()
    await people.homeserver.revoke(access_token)
    for is_running in (True, False):
        if not is_running:
            bot.log_path.unlink()
            await bot.start()
        status, line = await bot.refused()
        assert status == 77
        assert "check MATRIX_USER and MATRIX_ACCESS_TOKEN" in line


async def test_given_token_is_not_written_anywhere(
    people: People, room: Room, bot: Bot, access_token: str
) -> None:
    """Neither the state directory nor the log has it, at any level, and no device is added."""
    bot.environment["LOG_LEVEL"] = "DEBUG"
    devices = await people.account.devices()
    await bot.run()
    await room.command("hello")
    assert await room.replies(1) == ["hello"]
    assert await bot.stop() == 0
    assert people.bot_id in (bot.state / "session.json").read_text()
    for file in bot.directory.rglob("*"):
        assert file.is_dir() or access_token.encode() not in file.read_bytes()
    assert await people.account.devices() == devices
