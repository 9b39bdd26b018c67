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
from conftest import People
from support.bot import ECHOBOT, Bot, fork, new_bot
from support.certificates import CertificateAuthority
from support.homeserver import PASSWORD, User, free_port
from support.proxy import Fault, Proxy, running_proxy

MALFORMED = {
    "MATRIX_USER": ["", "@robot", "robot:example.com", "@:example.com", "@robot:example .com"],
    "MATRIX_PASSWORD": [""],
    "MATRIX_ACCESS_TOKEN": ["two words", "line\nbreak", "t\u00f6ken"],
    "MATRIX_HOMESERVER": ["example.com", "ftp://example.com", "https:///", "https://[::1"],
    "MATRIX_INVITERS": ["me:example.com", "@me:example.com example.com"],
    "LOG_LEVEL": ["LOUD"],
}


async def refusal(bot: Bot, *arguments: str) -> tuple[int, str]:
    """Start a bot that can't run; return its exit status and the one line that it writes."""
    await bot.start(*arguments)
    status = await bot.wait(20)
    (line,) = bot.log.splitlines()
    assert line.startswith("echobot: ")
    return status, line


@pytest.mark.parametrize("name", MALFORMED)
async def test_missing_or_malformed_variable_is_named(name: str) -> None:
    """The line says which variable it is and what to do, without its value; the status is 78."""

    async def check(value: str) -> None:
        async with new_bot("http://127.0.0.1:9", **{name: value}) as bot:
            status, line = await refusal(bot)
            assert status == 78
            assert f"{name} is m" in line
            assert ": set it" in line
            assert not value or value not in line

    await asyncio.gather(*map(check, MALFORMED[name]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MATRIX_HOMESERVER", "http://127.0.0.1:port"),
        ("MATRIX_HOMESERVER", "http://127.0.0.1:99999"),
        ("MATRIX_HOMESERVER", "http://example..com"),
        ("MATRIX_HOMESERVER", "https://user:hunter2@example.com"),
        ("HTTP_PROXY", "http://user:hunter2@127.0.0.1:port"),
        ("HTTP_PROXY", "socks5://user:hunter2@127.0.0.1:1080"),
    ],
)
async def test_url_that_no_request_can_use_is_refused(name: str, value: str) -> None:
    """Waiting would not mend it: the bot ends with 78, and a proxy's password is not printed."""
    async with new_bot("http://127.0.0.1:9", **{name: value}) as bot:
        status, line = await refusal(bot)
    assert status == 78
    assert name in line
    assert "hunter2" not in line


async def test_localpart_needs_a_homeserver() -> None:
    """Without a server name there is nothing to find the homeserver from."""
    async with new_bot("", MATRIX_USER="bot") as bot:
        status, line = await refusal(bot)
    assert status == 78
    assert "MATRIX_HOMESERVER is missing" in line


async def test_all_that_is_wrong_is_named_at_once() -> None:
    """One line has each variable to mend."""
    everything = {name: values[0] for name, values in MALFORMED.items()}
    async with new_bot("", **{**everything, "MATRIX_ACCESS_TOKEN": ""}) as bot:
        status, line = await refusal(bot)
    assert status == 78
    for name in MALFORMED:
        assert name in line


async def test_empty_environment_names_what_is_required() -> None:
    """Started with nothing at all, the bot asks for a user and a password."""
    async with new_bot("", MATRIX_USER="", MATRIX_PASSWORD="") as bot:
        status, line = await refusal(bot)
    assert status == 78
    assert "MATRIX_USER" in line
    assert "MATRIX_PASSWORD" in line


async def test_wrong_password_is_refused_with_77(bot: Bot) -> None:
    """The line names the homeserver, the user and the variables to check."""
    bot.environment["MATRIX_PASSWORD"] = "hunter2"
    status, line = await refusal(bot)
    assert status == 77
    for part in (bot.environment["MATRIX_HOMESERVER"], bot.environment["MATRIX_USER"]):
        assert part in line
    assert "MATRIX_PASSWORD" in line
    assert "hunter2" not in line


async def test_unknown_access_token_is_refused_with_77(bot: Bot) -> None:
    """The line names the variable to check, not the token."""
    bot.environment["MATRIX_ACCESS_TOKEN"] = "syt_unknown"
    status, line = await refusal(bot)
    assert status == 77
    assert "MATRIX_ACCESS_TOKEN" in line
    assert "syt_unknown" not in line


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


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_needs_no_environment(option: str) -> None:
    """It prints an example and every variable of the contract."""
    command = [sys.executable, str(ECHOBOT), option]
    run = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert "python echobot.py" in run.stdout
    for name in ("STATE_DIRECTORY", "HTTPS_PROXY", "NO_PROXY", "NOTIFY_SOCKET", *MALFORMED):
        assert name in run.stdout


@pytest.mark.parametrize(
    ("secret", "fault"),
    [
        ("MATRIX_PASSWORD", faults.answer(404, {"detail": "Not Found"})),
        ("MATRIX_PASSWORD", faults.not_json),
        ("MATRIX_ACCESS_TOKEN", faults.not_json),
        ("MATRIX_ACCESS_TOKEN", faults.empty_object),
    ],
    ids=["404", "web page", "web page for token", "empty object for token"],
)
async def test_url_without_homeserver_is_refused_with_78(
    proxied_bot: Bot, proxy: Proxy, secret: str, fault: Fault
) -> None:
    """The last line names the URL and the variable to check."""
    proxied_bot.environment[secret] = "swordfish"
    with proxy.inject(fault) as injection:
        await proxied_bot.start()
        assert await proxied_bot.wait(60) == 78
    line = proxied_bot.log.splitlines()[-1]
    assert f"no Matrix homeserver answers at {proxy.url}" in line
    assert "check MATRIX_HOMESERVER" in line
    assert "Traceback" not in proxied_bot.log
    assert injection.happened


async def test_failures_before_a_strange_answer_do_not_count_as_such(
    proxied_bot: Bot, proxy: Proxy
) -> None:
    """Only five strange answers in a row mean that there is no homeserver, not a bad start."""
    course = iter([faults.cut_before] * 5 + [faults.not_json] * 2)

    async def in_order(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        return await next(course)(proxy, request)

    proxied_bot.script = fork(proxied_bot.directory, MAX_BACKOFF=0.25)
    with proxy.inject(in_order, faults.LOGIN, times=7) as injection:
        await proxied_bot.run()
        assert injection.happened == 7


async def test_homeserver_that_is_down_at_the_start_is_waited_for(people: People) -> None:
    """One line says that it is down and why, one that it is back, and the bot logs in."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with new_bot(url, MATRIX_USER=people.bot_id) as bot:
        await bot.start()
        await bot.logs(f"Trouble with {url}: Cannot connect to host 127.0.0.1:{port}")
        async with running_proxy(people.homeserver.url, port):
            await bot.ready()
            assert bot.log.count("Trouble with") == bot.log.count("No more trouble") == 1
            assert len(bot.log.splitlines()) == 3


async def test_homeserver_that_never_answers_is_waited_for(proxied_bot: Bot, proxy: Proxy) -> None:
    """The line says that no answer came, and from where; once one comes, the bot logs in."""
    proxied_bot.script = fork(proxied_bot.directory, REQUEST_TIMEOUT=1)
    with proxy.inject(faults.silence, faults.LOGIN) as silence:
        await proxied_bot.start()
        await proxied_bot.logs(f"Trouble with {proxy.url}: no answer")
    await proxied_bot.ready()
    assert silence.happened


async def test_name_that_does_not_resolve_is_waited_for() -> None:
    """It may be the network that is not up yet; the line has the resolver's own words."""
    async with new_bot("https://matrix.invalid") as bot:
        await bot.start()
        await bot.logs("Trouble with https://matrix.invalid: ")
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
    url = f"https://127.0.0.1:{port}"
    environment = {"MATRIX_USER": people.bot_id, "SSL_CERT_FILE": str(authority.path)}
    async with new_bot(url, **environment) as bot:
        async with running_proxy(people.homeserver.url, port, untrusted) as proxy:
            await bot.start()
            await bot.logs(f"Trouble with {url}: ")
            assert "certificate verify failed" in bot.log
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
    "fault",
    [
        faults.not_json,
        faults.answer(200, {"m.homeserver": None}),
        faults.answer(200, {"m.homeserver": {"base_url": "nowhere"}}),
    ],
    ids=["web page", "null", "no URL"],
)
async def test_useless_well_known_is_refused_with_78(internet: Internet, fault: Fault) -> None:
    """The line says what was asked, and to set MATRIX_HOMESERVER."""
    with internet.server.inject(fault, WELL_KNOWN) as asked:
        await internet.bot.start()
        assert await internet.bot.wait(60) == 78
    line = internet.bot.log.splitlines()[-1]
    assert "https://echobot.test/.well-known/matrix/client" in line
    assert "set MATRIX_HOMESERVER" in line
    assert "Traceback" not in internet.bot.log
    assert asked.happened


@pytest.mark.parametrize("scheme", ["http://", ""])
async def test_http_proxy_is_used_and_plain_http_warned_about(
    people: People, alice: User, proxy: Proxy, scheme: str
) -> None:
    """A homeserver whose name only the proxy knows is reached, after a warning."""
    room_id = await people.room_with_bot(alice)
    environment = {"MATRIX_USER": people.bot_id, "HTTP_PROXY": proxy.url.replace("http://", scheme)}
    async with new_bot("http://matrix.invalid", **environment) as bot:
        await bot.run()
        await alice.send(room_id, "!replybot through the proxy")
        assert await people.replies(alice, room_id, 1) == ["through the proxy"]
        assert "WARNING http://matrix.invalid is not encrypted" in bot.log
    assert proxy.count("http://matrix.invalid/")


async def test_no_proxy_is_respected(bot: Bot) -> None:
    """A proxy that is down does no harm to hosts that are excepted; loopback needs no warning."""
    bot.environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "example.org,127.0.0.1"}
    await bot.run()
    assert "WARNING" not in bot.log


@pytest.mark.parametrize("level", ["DEBUG", "debug", "INFO"])
async def test_no_secret_is_in_the_output(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, level: str
) -> None:
    """Neither password nor access token nor message is, at any level, also with odd answers."""
    room_id = await people.room_with_bot(alice)
    proxied_bot.environment["LOG_LEVEL"] = level
    await proxied_bot.run()
    with (
        proxy.inject(faults.not_json, faults.SEND, times=1) as send,
        proxy.inject(faults.cut_body, faults.POLL, times=1) as poll,
    ):
        await alice.send(room_id, "!replybot my dark secret")
        await people.replies(alice, room_id, 1)
        await proxied_bot.logs("Answered")
    assert send.happened == poll.happened == 1
    for secret in (PASSWORD, proxied_bot.session["access_token"], "dark secret"):
        assert secret not in proxied_bot.log
