"""Wrong settings end the bot with one clear line; what may mend itself is waited out."""

import asyncio
import json
import ssl
import subprocess
import sys
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import support.proxy as faults
import trustme
from aiohttp import web
from support.bot import ECHOBOT, Bot, eventually, new_bot, together
from support.homeserver import free_port
from support.people import People, Room
from support.proxy import Proxy, running_proxy, served
from support.scripted import field_of
from yarl import URL

NOWHERE = "http://127.0.0.1:9"  # where nothing listens
VARIABLES = (
    "MATRIX_USER MATRIX_PASSWORD MATRIX_ACCESS_TOKEN MATRIX_HOMESERVER MATRIX_INVITERS"
    " STATE_DIRECTORY LOG_LEVEL NOTIFY_SOCKET HTTPS_PROXY HTTP_PROXY NO_PROXY"
)


# By variable: what can be used by nobody.
UNUSABLE = {
    # Docker's env files keep quotes; the others are what people take for a user ID.
    "MATRIX_USER": [
        "'@bot:echobot.test'",
        '"@bot:echobot.test"',
        "bot",
        "@bot",
        "bot:echobot.test",
        "bot@echobot.test",
        "@bot:",
        "@bot:echobot .test",
        "@the bot:echobot.test",
        "@bot:echobot.test:port",
        "@bot:echobot.test:65536",
        "@bot:https://echobot.test",
        "https://matrix.to/#/@bot:echobot.test",
        "@bot\udcff:echobot.test",
    ],
    "MATRIX_HOMESERVER": [
        "example.com",
        "ftp://example.com",
        "https:///",
        "https://[::1",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:65536",
        "http://127.0.0.1:66000",
        "'http://127.0.0.1:9'",
        "http://127.0.0.1:9?access_token=ssword",
        "http://127.0.0.1:9/#/login",
        "http://127.0.0.1:9/matrix?",
        "http://bot:ssword@127.0.0.1:9",
        "http://127.0.0.1:9/ ",
    ],
    "MATRIX_INVITERS": [
        "alice",
        "@alice",
        "alice:a.test",
        "@alice:a.test;@bob:b.test",
        "@alice:a.test, bob",
        "'@alice:a.test'",
        '"@alice:a.test @bob:b.test"',
        "https://matrix.to/#/@alice:a.test",
        "@alice:a.test\n@bob:b.test",
        "@alice:",
        "@alice:a.test:",
        "@alice:a.test/",
        "(@alice:a.test)",
        "@alice:https://a.test",
        ",",
    ],
    "LOG_LEVEL": ["LOUD", '"INFO"', "\u0130NFO"],
    # Bytes that are no UTF-8, as the environment brings them to Python.
    "MATRIX_PASSWORD": ["p\udce4ssword", "password\udced\udca0\udc80"],
    "MATRIX_ACCESS_TOKEN": ["\udcff"],
    "HTTP_PROXY": [
        "socks5://bot:ssword@127.0.0.1:1080",
        "http://",
        "http://bot:ssword@",
        "127.0.0.1:port",
        "127.0.0.1:65600",
        "127.0.0.1:66000",
        "http://bot:ssword@[::1:3128",
        "bot:ssword@no proxy",
        "http://bot:p#ssword@127.0.0.1:3128",
        "http://bot:p?ssword@127.0.0.1:3128",
        "'http://bot:ssword@127.0.0.1:3128'",
    ],
    "http_proxy": ["ftp://127.0.0.1:21"],
    "ALL_PROXY": ["socks5h://127.0.0.1:1080"],
    "all_proxy": ["socks4://127.0.0.1:1080"],
}


async def refusal(**environment: str) -> str:
    """Assert that with this environment it ends with 78 and one line; return that line."""
    async with new_bot(NOWHERE) as bot:
        bot.environment |= environment
        status, line = await (await bot.start()).refused()
        assert (status, bot.log) == (78, f"{line}\n"), environment
        return line


async def test_unusable_value_is_refused_with_78() -> None:
    """Waiting would not mend it; the one line has the variable's name, and never a password."""

    async def is_refused(name: str, value: str) -> None:
        line = await refusal(**{name: value})
        # Names of proxies are in use in both cases.
        assert name.lower() in line.lower(), (value, line)
        assert "ssword" not in line.replace("MATRIX_PASSWORD", "")
        # What people have in mind is the name before the @.
        assert name != "MATRIX_USER" or "\udcff" in value or "@bot:example.org" in line

    for name, values in UNUSABLE.items():
        await together(*(is_refused(name, value) for value in values))


async def test_all_that_is_missing_is_named_at_once() -> None:
    """An empty variable counts as missing; what can be set instead of the password is named too."""
    user, secret = {"MATRIX_USER": ""}, {"MATRIX_PASSWORD": ""}
    for line in (await refusal(**user), await refusal(**user, **secret)):
        assert "MATRIX_USER" in line
    for line in (await refusal(**secret), await refusal(**user, **secret)):
        assert "MATRIX_PASSWORD" in line
        assert "MATRIX_ACCESS_TOKEN" in line


VALID = {
    "@bot:echobot.test:8448": "echobot.test:443",
    "@bot:echobot.test:65535": "echobot.test:443",
    "@bot:127.0.0.1:8448": "127.0.0.1:443",
    "@bot:[::1]": "::1:443",
    "@bot:[2001:db8::1]:8448": "2001:db8::1:443",
    "@b.o=t/x_-+1:Echobot.Test": "echobot.test:443",
    # Until 2017 a localpart could have any printable character.
    "@Bot!o'#$~{t}:echobot.test": "echobot.test:443",
}


async def test_every_valid_user_id_is_taken() -> None:
    """With a port, an address or an old localpart; its server is asked for the homeserver."""

    async def is_taken(user: str) -> None:
        async with new_bot("", MATRIX_USER=user) as bot:
            await bot.start()
            await bot.logs(VALID[user])
            assert "Trouble with discovery" in bot.log
            assert await bot.stop() == 0

    await together(*map(is_taken, VALID))


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


def test_help_needs_no_environment() -> None:
    """It has an example and every variable of the contract, also where docstrings are left out."""
    script = str(ECHOBOT)
    for arguments in ([script, "--help"], ["-OO", "-I", script, "--help"]):
        command = [sys.executable, *arguments]
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


def publishes(url: str) -> faults.Fault:
    """The server's .well-known names this homeserver."""
    return faults.answer(200, {"m.homeserver": {"base_url": url}})


async def test_homeserver_is_found_from_the_user_id(
    people: People, room: Room, bot: Bot, server: Proxy
) -> None:
    """What the server publishes is used, itself on 404; whatever ails discovery, what was last.

    So a homeserver that has moved is found at the next start, and nothing is lost.
    """
    url = people.homeserver.url
    async with running_proxy(url) as elsewhere:
        course = [(faults.not_found, "https://echobot.test"), (publishes(f"{url}/"), url)]
        marked = "\ufeff" + json.dumps({"m.homeserver": {"base_url": url}})  # as by Notepad
        course.insert(1, (faults.answer(200, marked), url))
        troubles = (faults.not_found, faults.internal_error, faults.cut_before, faults.not_json)
        course += [(fault, url) for fault in troubles]
        course += [(publishes(elsewhere.url), elsewhere.url), (faults.not_found, elsewhere.url)]
        with server.inject(faults.not_json, WELL_KNOWN):
            await bot.start()
            what = "discovery (needed unless MATRIX_HOMESERVER is set)"
            await bot.logs(f"{what}: HTTP 200; trying again")
            await bot.stop()
        asked_of_old = 0
        for start, (fault, homeserver) in enumerate(course, 1):
            with server.inject(fault, WELL_KNOWN) as asked:
                await bot.start()
                await bot.ready(start)
                assert asked.happened
                if start > 1:
                    assert await room.replies(start - 1) == [str(n) for n in range(1, start)]
                    # Only discovery asks the server of the server name.
                    assert len(server.requests) == asked_of_old + asked.happened
                assert bot.session["homeserver"] == homeserver
            await bot.stop()
            await room.command(start)
            asked_of_old = len(server.requests)


async def test_discovery_that_hangs_holds_nothing_up(room: Room, bot: Bot, server: Proxy) -> None:
    """The homeserver of before is used."""
    bot.speed = server.speed = 20
    await bot.run()
    assert await bot.stop() == 0
    await room.command("meanwhile")
    with server.inject(faults.silence, WELL_KNOWN) as asked:
        await bot.start()
        assert await room.replies(1, seconds=10) == ["meanwhile"]
        assert asked.happened


async def test_redirect_of_the_homeserver_is_told() -> None:
    """It is not followed, as a login or a token would get lost on the way."""

    async def is_told(status: int) -> None:
        async def redirect(request: web.Request) -> web.StreamResponse:
            headers = {"Location": f"https://matrix.echobot.test{request.path_qs}"}
            return web.Response(status=status, headers=headers)

        async with served(redirect) as url, new_bot(url) as bot:
            await bot.start()
            await bot.logs(f"Trouble with the login at {url}: HTTP {status}; trying again")
            assert await bot.stop() == 0

    await together(*map(is_told, (301, 302, 307, 308)))


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


# The environment, with the proxy's address for {}; or what it asks for, where it is another URL.
BY_PROXY: list[dict[str, str]] = [
    {"HTTP_PROXY": "{}"},  # as curl takes it
    {"HTTP_PROXY": "http://{}/"},
    {"http_proxy": "{}"},
    {"ALL_PROXY": "{}"},
    {"all_proxy": "http://{}"},
    {"HTTP_PROXY": "{}", "ALL_PROXY": "socks5://127.0.0.1:9"},
    {"HTTP_PROXY": "us%40er:p%3Assw%2Ford%25@{}"},
    {"HTTP_PROXY": "http://us%40er:p%3Assw%2Ford%25@{}"},
    {"HTTP_PROXY": "{}", "NO_PROXY": "matrix.invalid:9, .example.org,nvalid,x.matrix.invalid,"},
]
DIRECTLY = ["*", "matrix.invalid", ".invalid", "example.org, invalid", "Matrix.Invalid:8008"]


async def test_proxy_of_the_environment_is_used() -> None:
    """In each of the forms that curl takes; what NO_PROXY excepts is reached directly."""
    asked: list[tuple[str, str]] = []

    async def refuse(request: web.Request) -> web.Response:
        asked.append((request.raw_path, request.headers.get("Proxy-Authorization", "")))
        return web.json_response({"errcode": "M_FORBIDDEN"}, status=403)

    async def goes_through(address: str, environment: dict[str, str]) -> None:
        async with new_bot("http://matrix.invalid:8008") as bot:
            bot.environment |= {k: v.replace("{}", address) for k, v in environment.items()}
            status, line = await (await bot.start()).refused()
        assert status == 77, line
        assert "ssw" not in line

    async def goes_directly(address: str, but_for: str) -> None:
        async with new_bot("http://matrix.invalid:8008") as bot:
            bot.environment |= {"HTTP_PROXY": address, "NO_PROXY": but_for}
            await bot.start()
            await bot.logs("Cannot connect to host matrix.invalid:8008")
            assert await bot.stop() == 0

    async with served(refuse) as url:
        address = url.removeprefix("http://")
        await together(
            *(goes_through(address, environment) for environment in BY_PROXY),
            *(goes_directly(address, but_for) for but_for in DIRECTLY),
        )
    assert len(asked) == len(BY_PROXY)
    assert {path for path, _ in asked} == {"http://matrix.invalid:8008/_matrix/client/v3/login"}
    basic = "Basic " + b64encode(b"us@er:p:ssw/ord%").decode()
    assert sorted(secret for _, secret in asked) == sorted([""] * (len(BY_PROXY) - 2) + [basic] * 2)


async def test_proxy_for_https_is_asked_for_a_tunnel(
    people: People, room: Room, bot: Bot, tmp_path: Path
) -> None:
    """Through it comes what is meant for the homeserver alone: the proxy sees only its name."""
    asked: list[bytes] = []
    tls = new_certificate(bot, tmp_path, "matrix.invalid")
    async with running_proxy(people.homeserver.url, tls=tls) as server:

        async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            port = int(server.url.rpartition(":")[2])
            reader_there, writer_there = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await together(pass_on(reader, writer_there), pass_on(reader_there, writer))

        listener = await asyncio.start_server(tunnel, "127.0.0.1")
        port = listener.sockets[0].getsockname()[1]
        bot.environment["MATRIX_HOMESERVER"] = "https://matrix.invalid"
        bot.environment["HTTPS_PROXY"] = f"user:p%40ssword@127.0.0.1:{port}"
        await bot.run()
        await room.command("through the tunnel")
        assert await room.replies(1) == ["through the tunnel"]
        assert await bot.stop() == 0
        listener.close()
    basic = b"Basic " + b64encode(b"user:p@ssword")
    assert all(head.startswith(b"CONNECT matrix.invalid:443 HTTP/1.1\r\n") for head in asked)
    assert all(basic in head for head in asked)
    assert "WARNING" not in bot.log


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Write what is read, until the end, or until one of them is cut."""
    try:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
    finally:
        writer.close()


@pytest.mark.parametrize("place", ["/_matrix/client", "/_matrix/"])
async def test_homeserver_with_a_wrong_path_is_told_from_a_wrong_password(
    people: People, place: str
) -> None:
    """A homeserver answers that it does not know the request: the line names the URL to mend."""

    async def is_named(**secret: str) -> None:
        async with new_bot(people.homeserver.url + place, MATRIX_USER=people.bot_id) as bot:
            bot.environment |= secret
            status, line = await (await bot.start()).refused()
        assert status in (77, 78)
        assert "MATRIX_HOMESERVER" in line

    await together(is_named(), is_named(MATRIX_ACCESS_TOKEN=people.account.access_token))


async def test_wrong_path_set_later_costs_no_command() -> None:
    """With what is saved of the right one, it neither gives up the position nor the session."""
    async with field_of(speed=60) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.stop()
        room.command("meanwhile")
        field.bot.environment["MATRIX_HOMESERVER"] += "/_matrix/client"
        before = field.proxy.count("")
        await field.bot.start()
        await eventually(lambda: field.proxy.count("") > before)
        began = field.now()
        # Longer than the minute after which a position that is refused is given up.
        await eventually(lambda: not field.bot.running or field.now() - began > 150)
        if field.bot.running:
            await field.bot.stop()
        else:
            assert "MATRIX_HOMESERVER" in (await field.bot.refused())[1]
        field.bot.environment["MATRIX_HOMESERVER"] = field.proxy.url
        await field.bot.start()
        await room.answers("meanwhile")


@pytest.mark.parametrize("path", ["/matrix", "/matrix/", "/a/b.c~d"])
async def test_homeserver_under_a_path_is_reached(path: str) -> None:
    """A reverse proxy may have it there."""
    async with field_of() as field:

        async def strip(request: web.Request) -> web.Response:
            assert request.raw_path.startswith(f"{path.rstrip('/')}/_matrix/")
            inner = request.raw_path.removeprefix(path.rstrip("/"))
            return await field.server.handle(request.clone(rel_url=URL(inner, encoded=True)))

        room = field.server.room()
        async with served(strip) as url:
            field.bot.environment["MATRIX_HOMESERVER"] = url + path
            await field.bot.run()
            room.command("hello")
            await room.answers("hello")
            await field.bot.stop()


INVITERS = {
    "@alice:a.test, @bob:b.test": "alice bob",
    "@alice:a.test,@bob:b.test": "alice bob",
    "@alice:a.test  @bob:b.test": "alice bob",
    ", @alice:a.test ,,": "alice",
    "@*:b.test,@[c]ar?l:*": "bob carol",
    "@alice:a.test *:b.test": "alice bob",
    "*": "alice bob carol",
    "": "alice bob carol",
}


async def test_inviters_are_separated_by_spaces_or_commas() -> None:
    """Those whom a pattern names are followed, the invitations of others are rejected."""

    async def follows(inviters: str, followed: str) -> None:
        async with field_of() as field:
            field.bot.environment["MATRIX_INVITERS"] = inviters
            rooms = {}
            for sender in ("@alice:a.test", "@bob:b.test", "@carol:c.test"):
                rooms[sender] = field.server.room("leave")
                rooms[sender].set_membership("invite", sender)
            await field.bot.start()
            await eventually(
                lambda: {room.membership for room in rooms.values()} <= {"join", "leave"}
            )
            joined = [sender for sender, room in rooms.items() if room.membership == "join"]
            assert [sender[1:].partition(":")[0] for sender in joined] == followed.split(), inviters

    await together(*(follows(inviters, followed) for inviters, followed in INVITERS.items()))
