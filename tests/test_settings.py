"""Wrong settings end the bot with one clear line; what may mend itself is waited out."""

import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import support.proxy as faults
import trustme
from support.bot import ECHOBOT, Bot, new_bot
from support.homeserver import free_port
from support.people import People, Room
from support.proxy import Proxy, running_proxy

VARIABLES = (
    "MATRIX_USER MATRIX_PASSWORD MATRIX_ACCESS_TOKEN MATRIX_HOMESERVER MATRIX_INVITERS"
    " STATE_DIRECTORY LOG_LEVEL NOTIFY_SOCKET HTTPS_PROXY HTTP_PROXY NO_PROXY"
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MATRIX_USER", ""),
        ("MATRIX_PASSWORD", ""),
        ("LOG_LEVEL", "LOUD"),
        ("MATRIX_HOMESERVER", "example.com"),
        ("MATRIX_HOMESERVER", "ftp://example.com"),
        ("MATRIX_HOMESERVER", "https:///"),
        ("MATRIX_HOMESERVER", "https://[::1"),
        ("MATRIX_HOMESERVER", "http://127.0.0.1:port"),
        ("MATRIX_HOMESERVER", "http://127.0.0.1:99999"),
        # Bytes that are no UTF-8, as the environment brings them to Python.
        ("MATRIX_PASSWORD", "p\udce4ssword"),
        ("MATRIX_PASSWORD", "password\udced\udca0\udc80"),
        ("MATRIX_ACCESS_TOKEN", "\udcff"),
        ("MATRIX_USER", "@bot\udcff:echobot.test"),
    ],
)
async def test_missing_or_unusable_value_is_refused_with_78(name: str, value: str) -> None:
    """Waiting would not mend it; the one line has the variable's name, and never a password."""
    async with new_bot("http://127.0.0.1:9") as bot:
        bot.environment[name] = value
        status, line = await (await bot.start()).refused()
        assert bot.log.splitlines() == [line]
    assert status == 78
    assert name in line
    assert "ssword" not in line


@pytest.mark.parametrize(
    ("name", "value"), [("MATRIX_PASSWORD", "hunter2"), ("MATRIX_ACCESS_TOKEN", "syt_hunter2")]
)
async def test_wrong_secret_is_refused_with_77(bot: Bot, name: str, value: str) -> None:
    """The line names the homeserver, the user and the variable to check, not the secret."""
    bot.environment[name] = value
    status, line = await (await bot.start()).refused()
    assert status == 77
    for part in (bot.environment["MATRIX_HOMESERVER"], bot.environment["MATRIX_USER"], name):
        assert part in line
    assert "hunter2" not in line


async def test_access_token_of_another_user_is_refused_with_78(room: Room, bot: Bot) -> None:
    """The line says whose token it is."""
    bot.environment["MATRIX_ACCESS_TOKEN"] = room.user.access_token
    status, line = await (await bot.start()).refused()
    assert status == 78
    assert room.user.user_id in line
    assert room.user.access_token not in line


@pytest.mark.parametrize("directory", ["/nonexistent", __file__, "/proc"])
async def test_unusable_state_directory_is_refused_with_78(bot: Bot, directory: str) -> None:
    """One that is not there, that is a file, or that nothing can be written to (even by root)."""
    bot.environment["STATE_DIRECTORY"] = directory
    status, line = await (await bot.start()).refused()
    assert status == 78
    assert "STATE_DIRECTORY" in line
    assert directory in line


@pytest.mark.parametrize("arguments", [["--verbose"], ["run", "now"]])
async def test_unknown_argument_is_refused_with_2(bot: Bot, arguments: list[str]) -> None:
    """There are no arguments but --help."""
    status, line = await (await bot.start(*arguments)).refused()
    assert status == 2
    assert "--help" in line


@pytest.mark.parametrize("options", [[], ["-O"], ["-OO"], ["-OO", "-I"]], ids=" ".join)
def test_help_needs_no_environment(options: list[str]) -> None:
    """It has an example and every variable of the contract, also where docstrings are left out."""
    for argument in ("--help", "-h"):
        command = [sys.executable, *options, str(ECHOBOT), argument]
        run = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, check=True)
        assert run.stderr == ""
        for text in ("python echobot.py", *VARIABLES.split()):
            assert text in run.stdout


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


async def test_name_that_does_not_resolve_is_waited_for() -> None:
    """It may be the network that is not up yet; the line has the resolver's own words."""
    async with new_bot("https://matrix.invalid") as bot:
        await bot.start()
        await bot.logs("Trouble with the login at https://matrix.invalid: ")
        (line,) = bot.log.splitlines()
        assert "matrix.invalid:443" in line
        assert any(word in line for word in ("not known", "resolution", "resolve", "No address"))
        assert await bot.stop() == 0


def new_certificate(bot: Bot, directory: Path, *hosts: str) -> ssl.SSLContext:
    """Return what a server of these hosts needs for TLS; the bot trusts who issued it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    bot.environment["SSL_CERT_FILE"] = str(directory / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*hosts).configure_cert(context)
    return context


async def test_certificate_that_does_not_verify_is_waited_for(
    people: People, bot: Bot, tmp_path: Path
) -> None:
    """The cause is told, no request is made; once the server has a good one, the bot logs in."""
    untrusted = new_certificate(bot, tmp_path, "127.0.0.1")
    trusted = new_certificate(bot, tmp_path, "127.0.0.1")
    async with running_proxy(people.homeserver.url, tls=untrusted) as proxy:
        bot.environment["MATRIX_HOMESERVER"] = proxy.url
        await bot.start()
        await bot.logs("certificate verify failed")
        assert proxy.requests == []
    port = int(proxy.url.rpartition(":")[2])
    async with running_proxy(people.homeserver.url, port, trusted):
        await bot.ready()
        await bot.logs("No more trouble")


# What stands for the internet: the host name of the user IDs is that of a server on this machine.
RESOLVER = """
import socket
def getaddrinfo(host, port, *arguments, real=socket.getaddrinfo, **options):
    here = host == "echobot.test"
    return real(*(("127.0.0.1", {port}) if here else (host, port)), *arguments, **options)
socket.getaddrinfo = getaddrinfo
"""
WELL_KNOWN = "GET /.well-known/matrix/client"


@pytest.fixture
async def server(people: People, bot: Bot, tmp_path: Path) -> AsyncIterator[Proxy]:
    """The server of the bot's server name; the bot is not told its homeserver, and finds that."""
    tls = new_certificate(bot, tmp_path, "echobot.test")
    bot.environment["MATRIX_HOMESERVER"] = ""
    async with running_proxy(people.homeserver.url, tls=tls) as server:
        bot.customize = RESOLVER.format(port=server.url.rpartition(":")[2])
        yield server


async def test_homeserver_is_found_from_the_user_id(
    people: People, room: Room, bot: Bot, server: Proxy
) -> None:
    """What the server publishes is used, itself on 404; while it can't tell, what was used last.

    So a homeserver that has moved is found at the next start, and nothing is lost.
    """
    url = people.homeserver.url
    published = faults.answer(200, {"m.homeserver": {"base_url": f"{url}/"}})
    course = [(faults.not_found, "https://echobot.test"), (published, url)]
    troubles = (faults.internal_error, faults.cut_before, faults.not_json)
    course += [(fault, url) for fault in troubles]
    with server.inject(faults.not_json, WELL_KNOWN):
        await bot.start()
        await bot.logs("discovery (needed unless MATRIX_HOMESERVER is set): HTTP 200; trying again")
        await bot.stop()
    asked_of_old = 0
    for start, (fault, homeserver) in enumerate(course, 1):
        with server.inject(fault, WELL_KNOWN) as asked:
            await bot.start()
            await bot.ready(start)
            assert asked.happened
            if start > 1:
                assert await room.replies(start - 1) == [str(n) for n in range(1, start)]
                assert len(server.requests) == asked_of_old + asked.happened
            assert bot.session["homeserver"] == homeserver
        await bot.stop()
        await room.command(start)
        asked_of_old = len(server.requests)


@pytest.mark.parametrize("published", [None, {"base_url": "nowhere"}], ids=["null", "no URL"])
async def test_useless_well_known_is_refused_with_78(
    bot: Bot, server: Proxy, published: object
) -> None:
    """The line says what was asked, and to set MATRIX_HOMESERVER."""
    with server.inject(faults.answer(200, {"m.homeserver": published}), WELL_KNOWN) as asked:
        status, line = await (await bot.start()).refused()
    assert status == 78
    assert "echobot.test" in line
    assert "MATRIX_HOMESERVER" in line
    assert asked.happened


async def test_proxy_of_the_environment_is_used(room: Room, bot: Bot, proxy: Proxy) -> None:
    """A homeserver whose name only the proxy knows is reached; one that is excepted, directly."""
    bot.environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "example.org,127.0.0.1"}
    await bot.run()
    assert await bot.stop() == 0
    bot.environment |= {"HTTP_PROXY": proxy.url, "MATRIX_HOMESERVER": "http://matrix.invalid"}
    await bot.start()
    await room.command("through the proxy")
    assert await room.replies(1) == ["through the proxy"]
    assert proxy.count("http://matrix.invalid/")
    assert "WARNING" not in bot.log
