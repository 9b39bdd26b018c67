"""Wrong settings end the bot with one clear line; what may mend itself is waited out."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import support.proxy as faults
from aiohttp import web
from support.bot import ECHOBOT, Bot, new_bot
from support.certificates import CertificateAuthority
from support.homeserver import PASSWORD, User, free_port
from support.people import People, Room
from support.proxy import POLL, SEND, Fault, Proxy, running_proxy

VARIABLES = (
    "MATRIX_USER MATRIX_PASSWORD MATRIX_ACCESS_TOKEN MATRIX_HOMESERVER MATRIX_INVITERS"
    " STATE_DIRECTORY LOG_LEVEL NOTIFY_SOCKET HTTPS_PROXY HTTP_PROXY NO_PROXY"
)


async def refusal(bot: Bot, *arguments: str) -> tuple[int, str]:
    """Start a bot that can't run; return its exit status and the line that says why."""
    await bot.start(*arguments)
    status = await bot.wait(20)
    assert "Traceback" not in bot.log
    *_, line = bot.log.splitlines()
    assert bot.log.count("echobot: ") == 1
    assert line.startswith("echobot: ")
    return status, line


@pytest.mark.parametrize("missing", ["MATRIX_USER", "MATRIX_PASSWORD"])
async def test_missing_variable_is_named(missing: str) -> None:
    """Whether one is missing or, started with nothing at all, both, each is named at once."""
    async with new_bot("http://127.0.0.1:9") as bot:
        bot.environment[missing] = ""
        status, line = await refusal(bot)
    assert status == 78
    assert missing in line
    async with new_bot("", MATRIX_USER="", MATRIX_PASSWORD="") as bot:
        status, line = await refusal(bot)
    assert status == 78
    assert missing in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOG_LEVEL", "LOUD"),
        ("MATRIX_HOMESERVER", "example.com"),
        ("MATRIX_HOMESERVER", "ftp://example.com"),
        ("MATRIX_HOMESERVER", "https:///"),
        ("MATRIX_HOMESERVER", "https://[::1"),
        ("MATRIX_HOMESERVER", "http://127.0.0.1:port"),
        ("MATRIX_HOMESERVER", "http://127.0.0.1:99999"),
        # Bytes that are no UTF-8, as the environment brings them to Python.
        ("MATRIX_PASSWORD", "p\udce4ssword"),
    ],
)
async def test_unusable_value_is_refused_with_78(name: str, value: str) -> None:
    """Waiting would not mend it; the line says which variable it is, and never a password."""
    async with new_bot("http://127.0.0.1:9") as bot:
        bot.environment[name] = value
        status, line = await refusal(bot)
    assert status == 78
    assert name in line
    assert "ssword" not in line


@pytest.mark.parametrize(
    ("name", "value"), [("MATRIX_PASSWORD", "hunter2"), ("MATRIX_ACCESS_TOKEN", "syt_hunter2")]
)
async def test_wrong_secret_is_refused_with_77(bot: Bot, name: str, value: str) -> None:
    """The line names the homeserver, the user and the variable to check, not the secret."""
    bot.environment[name] = value
    status, line = await refusal(bot)
    assert status == 77
    for part in (bot.environment["MATRIX_HOMESERVER"], bot.environment["MATRIX_USER"], name):
        assert part in line
    assert "hunter2" not in line


async def test_access_token_of_another_user_is_refused_with_78(alice: User, bot: Bot) -> None:
    """The line says whose token it is."""
    bot.environment["MATRIX_ACCESS_TOKEN"] = alice.access_token
    status, line = await refusal(bot)
    assert status == 78
    assert alice.user_id in line
    assert alice.access_token not in line


@pytest.mark.parametrize("directory", ["/nonexistent", __file__, "/proc"])
async def test_unusable_state_directory_is_refused_with_78(bot: Bot, directory: str) -> None:
    """One that is not there, that is a file, or that nothing can be written to (even by root)."""
    bot.environment["STATE_DIRECTORY"] = directory
    status, line = await refusal(bot)
    assert status == 78
    assert "STATE_DIRECTORY" in line
    assert directory in line


@pytest.mark.parametrize("arguments", [["--verbose"], ["run", "now"]])
async def test_unknown_argument_is_refused_with_2(bot: Bot, arguments: list[str]) -> None:
    """There are no arguments but --help."""
    status, line = await refusal(bot, *arguments)
    assert status == 2
    assert "--help" in line


@pytest.mark.parametrize("options", [[], ["-OO"]], ids=["", "-OO"])
def test_help_needs_no_environment(options: list[str]) -> None:
    """It prints an example and every variable of the contract, also where docstrings are left."""
    command = [sys.executable, *options, str(ECHOBOT), "--help"]
    run = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert "python echobot.py" in run.stdout
    for name in VARIABLES.split():
        assert name in run.stdout


async def test_homeserver_that_is_down_at_the_start_is_waited_for(people: People) -> None:
    """One line says that it is down and why, one that it is back, and the bot logs in."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with new_bot(url, MATRIX_USER=people.bot_id) as bot:
        await bot.start()
        cause = f"Cannot connect to host 127.0.0.1:{port}"
        await bot.logs(f"WARNING Trouble with the login at {url}: {cause}")
        async with running_proxy(people.homeserver.url, port):
            await bot.ready()
            await bot.logs(f"INFO No more trouble with the login at {url}")
            assert len(bot.log.splitlines()) == 3


async def test_strange_answers_at_the_first_login_are_waited_out(
    quick_bot: Bot, proxy: Proxy
) -> None:
    """A homeserver that starts, or the page of a hotel's network, is told and costs nothing."""
    course = iter([faults.cut_before] * 3 + [faults.not_json] * 7)

    async def in_order(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        return await next(course)(proxy, request)

    with proxy.inject(in_order, faults.LOGIN, times=10) as strange:
        await quick_bot.run()
        assert strange.happened == 10
    assert quick_bot.log.count(f"Trouble with the login at {proxy.url}") == 2


async def test_name_that_does_not_resolve_is_waited_for() -> None:
    """It may be the network that is not up yet; the line has the resolver's own words."""
    async with new_bot("https://matrix.invalid") as bot:
        await bot.start()
        await bot.logs("Trouble with the login at https://matrix.invalid: ")
        (line,) = bot.log.splitlines()
        assert "matrix.invalid:443" in line
        assert any(word in line for word in ("not known", "resolution", "resolve", "No address"))
        assert await bot.stop() == 0


async def test_certificate_that_does_not_verify_is_waited_for(
    people: People, tmp_path: Path
) -> None:
    """The cause is told, no request is made; once the server has a good one, the bot logs in."""
    port = free_port()
    authority = CertificateAuthority(tmp_path)
    trusted, untrusted = authority.server("127.0.0.1"), authority.server("echobot.test")
    async with new_bot(f"https://127.0.0.1:{port}", MATRIX_USER=people.bot_id) as bot:
        bot.environment["SSL_CERT_FILE"] = str(authority.path)
        async with running_proxy(people.homeserver.url, port, untrusted) as proxy:
            await bot.start()
            await bot.logs("certificate verify failed")
            assert proxy.requests == []
        async with running_proxy(people.homeserver.url, port, trusted):
            await bot.ready()
            await bot.logs("No more trouble")


@asynccontextmanager
async def connect_proxy(upstream: Proxy) -> AsyncIterator[tuple[str, list[str]]]:
    """Run a proxy for HTTPS_PROXY that leads every host to one server; yield URL and requests."""
    requests: list[str] = []
    port = int(upstream.url.rpartition(":")[2])

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        requests.append(request.splitlines()[0])
        from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(pipe(reader, to_server), pipe(from_server, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests
    finally:
        server.close()


@dataclass
class Internet:
    """What a bot sees that has only its user ID: a TLS server of that name, behind HTTPS_PROXY."""

    server: Proxy
    bot: Bot
    connections: list[str]


@pytest.fixture
async def internet(people: People, tmp_path: Path) -> AsyncIterator[Internet]:
    """A bot that was not told its homeserver, and the server of its user ID's server name."""
    authority = CertificateAuthority(tmp_path)
    tls = authority.server("echobot.test")
    async with (
        running_proxy(people.homeserver.url, tls=tls) as server,
        connect_proxy(server) as (proxy_url, connections),
        new_bot(
            "",
            MATRIX_USER=people.bot_id,
            HTTPS_PROXY=proxy_url,
            SSL_CERT_FILE=str(authority.path),
        ) as bot,
    ):
        yield Internet(server, bot, connections)


WELL_KNOWN = "GET /.well-known/matrix/client"


async def test_homeserver_is_found_from_the_user_id(people: People, internet: Internet) -> None:
    """The base URL in /.well-known/matrix/client is used, a slash at its end or not."""
    base_url = people.homeserver.url + "/"
    found = faults.answer(200, {"m.homeserver": {"base_url": base_url}})
    with internet.server.inject(found, WELL_KNOWN) as asked:
        await internet.bot.run()
    assert asked.happened
    assert internet.connections == ["CONNECT echobot.test:443 HTTP/1.1"]
    assert internet.bot.session["homeserver"] == people.homeserver.url


async def test_server_name_is_the_homeserver_if_it_publishes_none(internet: Internet) -> None:
    """404 for /.well-known/matrix/client means https://SERVER_NAME."""
    with internet.server.inject(faults.answer(404, {}), WELL_KNOWN) as asked:
        await internet.bot.run()
    assert asked.happened
    assert internet.bot.session["homeserver"] == "https://echobot.test"
    assert set(internet.connections) == {"CONNECT echobot.test:443 HTTP/1.1"}


@pytest.mark.parametrize(
    "published",
    [{"m.homeserver": None}, {"m.homeserver": {"base_url": "nowhere"}}],
    ids=["null", "no URL"],
)
async def test_useless_well_known_is_refused_with_78(internet: Internet, published: object) -> None:
    """The line says what was asked, and to set MATRIX_HOMESERVER."""
    with internet.server.inject(faults.answer(200, published), WELL_KNOWN) as asked:
        status, line = await refusal(internet.bot)
    assert status == 78
    assert "echobot.test" in line
    assert "MATRIX_HOMESERVER" in line
    assert asked.happened


@pytest.mark.parametrize("fault", [faults.internal_error, faults.cut_before, faults.not_json])
async def test_last_homeserver_is_used_if_it_can_not_be_found(
    people: People, internet: Internet, fault: Fault
) -> None:
    """What session.json has is good enough while the server that would tell it is in trouble."""
    base_url = {"m.homeserver": {"base_url": people.homeserver.url}}
    with internet.server.inject(faults.answer(200, base_url), WELL_KNOWN):
        await internet.bot.run()
    await internet.bot.stop()
    with internet.server.inject(fault, WELL_KNOWN) as asked:
        await internet.bot.start()
        await internet.bot.ready(times=2)
        assert asked.happened
    assert internet.bot.session["homeserver"] == people.homeserver.url


async def test_http_proxy_is_used_and_plain_http_warned_about(room: Room, proxy: Proxy) -> None:
    """A homeserver whose name only the proxy knows is reached, after a warning."""
    async with new_bot("http://matrix.invalid", MATRIX_USER=room.bot_id) as bot:
        bot.environment["HTTP_PROXY"] = proxy.url
        await bot.run()
        await room.command("through the proxy")
        assert await room.replies(1) == ["through the proxy"]
        assert "WARNING http://matrix.invalid is not encrypted" in bot.log
    assert proxy.count("http://matrix.invalid/")


async def test_no_proxy_is_respected(bot: Bot) -> None:
    """A proxy that is down does no harm to hosts that are excepted; loopback needs no warning."""
    bot.environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "example.org,127.0.0.1"}
    await bot.run()
    assert "WARNING" not in bot.log


@pytest.mark.parametrize("level", ["DEBUG", "debug", "INFO"])
async def test_no_secret_is_in_the_output(
    room: Room, proxied_bot: Bot, proxy: Proxy, level: str
) -> None:
    """Neither password nor access token nor message is, at any level, also with odd answers."""
    proxied_bot.environment["LOG_LEVEL"] = level
    await proxied_bot.run()
    with (
        proxy.inject(faults.not_json, SEND, times=1) as send,
        proxy.inject(faults.cut_body, POLL, times=1) as poll,
    ):
        await room.command("my dark secret")
        await room.replies(1)
        await proxied_bot.logs("Answered")
        assert send.happened == poll.happened == 1
    for secret in (PASSWORD, proxied_bot.session["access_token"], "dark secret"):
        assert secret not in proxied_bot.log
