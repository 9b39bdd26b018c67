"""What a homeserver says of an account is waited for, or told in its own words."""

import pytest
import support.proxy as faults
from support.bot import together
from support.proxy import LOGIN, POLL, SEND, SYNC
from support.scripted import field_of

STATES: dict[str, tuple[int, str, dict[str, object]]] = {
    "M_USER_LOCKED": (401, "This account has been locked", {"soft_logout": True}),
    "M_RESOURCE_LIMIT_EXCEEDED": (403, "This homeserver is full", {"admin_contact": "mailto:a@b"}),
    "M_USER_SUSPENDED": (403, "This account is suspended", {}),
    "M_CONSENT_NOT_GIVEN": (403, "Agree to the terms first", {"consent_uri": "https://x.test"}),
}
PLACES = {"login": LOGIN, "later login": LOGIN, "sync": SYNC, "poll": POLL, "send": SEND}


@pytest.mark.parametrize("place", PLACES)
async def test_account_state_is_waited_for(place: str) -> None:
    """It is told once with the server's own words; once somebody mended it, nothing is lost."""
    await together(*(state_is_waited_for(errcode, place) for errcode in STATES))


async def state_is_waited_for(errcode: str, place: str) -> None:
    """Assert that for one state at one place."""
    status, error, more = STATES[errcode]
    state = faults.answer(status, {"errcode": errcode, "error": error, **more})
    async with field_of(speed=120) as field:
        room = field.server.room()
        if place in ("later login", "poll", "send"):
            await field.bot.run()
        with field.proxy.inject(state, PLACES[place]) as injected:
            if place in ("login", "sync"):
                await field.bot.start()
            elif place == "later login":
                field.server.devices.clear()
            if place != "send":
                await injected.happens()
            room.command(*range(3))
            await injected.happens(injected.happened + 1)
            began = field.now()
            # Longer than any failure is borne in a room.
            while field.now() - began < 660:
                await injected.happens(injected.happened + 1)
            assert field.bot.running, field.bot.log
            assert not room.replies
        if place in ("login", "sync"):
            # What is said before the first position is no news: that is said now.
            await field.bot.ready()
            room.command("after")
            await room.answers("after")
        else:
            await room.answers(*range(3))
        assert f"HTTP {status} {errcode} {error!r}" in field.bot.log
        # One waits for each of the requests that met it, and each tells it once.
        assert field.bot.log.count(errcode) <= 2
        assert "Gave up" not in field.bot.log


@pytest.mark.parametrize(
    ("errcode", "error"),
    [
        ("M_FORBIDDEN", "Password login has been disabled."),
        ("M_USER_DEACTIVATED", "This account has been deactivated"),
        ("M_UNKNOWN", "Bad login type: log in with single sign-on"),
    ],
)
async def test_login_says_why_it_is_refused(errcode: str, error: str) -> None:
    """Exit status 77, and the last line has the server's own text."""
    async with field_of() as field:
        refused = faults.answer(403, {"errcode": errcode, "error": error})
        with field.proxy.inject(refused, LOGIN) as injected:
            status, line = await (await field.bot.start()).refused()
        assert status == 77
        assert error in line
        assert injected.happened == 1
