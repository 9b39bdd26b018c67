"""Polls that fail, hurry or bring nothing cost no command, no rush and no time."""

import asyncio
import re
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import support.proxy as faults
from aiohttp import web
from support.bot import eventually, together
from support.proxy import FIRST_SYNC, JOIN, LOGIN, MESSAGES, POLL, SEND, SYNC, Fault, Proxy
from support.scripted import ALICE, DENDRITE, JSON, SYNAPSE, Manners, field_of
from test_owed_replies import families, is_past
from test_refused_invitations import FORBIDDEN, LEAVE, NOT_FOUND, OWNER

MALFORMED = faults.answer(400, {"errcode": "M_INVALID_PARAM", "error": "Malformed since"})


async def test_first_sync_that_fails_for_good_costs_only_old_invitations() -> None:
    """At a restart the bot goes on from its position, whatever the sync without one comes to."""
    await together(*map(goes_on, (NOT_FOUND, faults.internal_error, faults.silence)))


@pytest.mark.long
async def test_first_sync_that_hangs_holds_up_only_the_start() -> None:
    """It waits some seconds for older invitations to be followed; later gaps do not."""
    async with field_of(timeline_limit=5) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        room.command(*range(20))
        with field.proxy.inject(faults.silence, FIRST_SYNC) as hanging:
            await field.bot.start()
            await hanging.happens()
            await room.answers(*range(20), seconds=60)
            began, before = field.now(), field.proxy.count(MESSAGES)
            room.command(*range(20, 40))
            await room.answers(*range(40), seconds=60)
            assert field.now() - began < 4
            assert field.proxy.count(MESSAGES) > before, "that was no gap"


async def goes_on(trouble: Fault) -> None:
    """Assert that for one kind of trouble; once that is over, the old invitation is followed."""
    async with field_of(speed=5) as field:
        room, owing = [field.server.room() for _ in range(2)]
        await field.bot.run()
        name = owing.room_id[1:].partition(":")[0]
        with (
            field.proxy.inject(faults.silence, JOIN) as joining,
            field.proxy.inject(faults.silence, rf"(?=.*{name}\W){SEND}") as sending,
        ):
            invited = field.server.room("invite")
            await joining.happens()
            owing.command("owed")
            await sending.happens()
            room.command("first")
            await room.answers("first")
            owed = {invited.room_id, owing.room_id}
            await eventually(lambda: owed <= field.bot.unfinished.keys())
            await field.bot.kill()
        invited.command("invited")
        room.command("second")
        before = len(field.proxy.requests)
        with field.proxy.inject(trouble, FIRST_SYNC) as failing:
            await field.bot.start()
            await room.answers("first", "second")
            await owing.answers("owed")
            new = field.server.room("invite")
            new.command("new")
            await new.answers("new")
            await failing.happens()
            if trouble is faults.silence:
                return
            await failing.happens(3)
        asked = field.proxy.requests[before:]
        syncs = {request for request in asked if re.search(FIRST_SYNC, request)}
        assert len(syncs) > 1, "a failure may be cached"
        await invited.answers("invited")


async def test_slow_answers_are_waited_for_longer_each_time() -> None:
    """Where everything takes 75 s, a login, syncs, a join, pages and sends come to their end."""
    async with field_of(DENDRITE, speed=120) as field:
        patterns = [LOGIN, FIRST_SYNC, POLL, JOIN, MESSAGES, SEND]
        with field.proxy.inject(faults.slow(75), "|".join(patterns)):
            await field.bot.run()
            room = field.server.room("invite")
            room.command("hello")
            await field.bot.logs("Answered", seconds=60)
            await room.answers("hello")
        for pattern in patterns[:-1]:
            assert field.proxy.count(pattern) >= 2, f"{pattern} was not cut at first"
        assert "Trouble with the reply to" in field.bot.log


async def test_watchdog_is_fed_while_a_sync_is_slow(tmp_path: Path) -> None:
    """While the first sync takes 400 s, systemd is told as often as the README's unit asks.

    That is every 300 s.
    """
    async with field_of(speed=120) as field:
        fed: list[float] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.bind(str(tmp_path / "notify"))
            loop = asyncio.get_running_loop()
            loop.add_reader(unix, lambda: fed.append(len(unix.recv(4096)) and field.now()))
            field.bot.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
            with field.proxy.inject(faults.slow(400), FIRST_SYNC) as slow:
                await field.bot.start()
                await field.bot.ready()
            loop.remove_reader(unix)
        assert slow.happened >= 4
        assert fed[-1] - fed[0] > 700
        assert max(later - earlier for earlier, later in pairwise(fed)) < 290


@pytest.mark.parametrize("seconds", [5, 30])
async def test_quiet_polls_that_are_cut_are_no_outage(seconds: int) -> None:
    """After 150 s in which a proxy cut each quiet poll, a command is answered promptly."""
    async with field_of(speed=20) as field:
        room = field.server.room()
        await field.bot.run()
        field.proxy.speed = 15  # The homeserver holds them longer than the proxy.
        with field.proxy.inject(faults.impatient(seconds), POLL) as cut:
            began = field.now()
            await eventually(lambda: field.now() - began > 150)
            assert cut.happened > 150 / (2 * seconds + 4), "polls were put off"
            said = field.now()
            room.command("hello")
            await room.answers("hello")
            assert field.now() - said < 25
            assert field.bot.log.count("Trouble with the sync: HTTP 504") > 0


async def test_failed_sync_that_is_cached_is_asked_for_otherwise() -> None:
    """Where a proxy repeats a 500 for one `since` and `timeout`, the next attempt differs."""
    failed: list[str] = []

    async def fail(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        failed.append(request.raw_path)
        if request.raw_path != failed[0]:
            return await proxy.forward(request)
        return await faults.internal_error(proxy, request)

    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        with field.proxy.inject(fail, POLL) as polls:
            room.say("this ends the poll before")
            await polls.happens()
            room.command("hello")
            await room.answers("hello", seconds=10)
        assert failed.count(failed[0]) < len(failed)


async def test_position_refused_for_a_moment_is_kept() -> None:
    """One 400 or 404, or minutes of them where any sync is refused, costs no command."""
    html = [faults.answer(status, "<html>Sorry</html>") for status in (400, 404)]
    await together(
        *(position_is_kept(refusal, 1) for refusal in (MALFORMED, NOT_FOUND)),
        *(position_is_kept(refusal, 12, SYNC) for refusal in (MALFORMED, NOT_FOUND)),
        *(position_is_kept(refusal, 7) for refusal in html),
        position_is_kept(faults.in_turn(MALFORMED, faults.silence, MALFORMED), 3),
    )


async def position_is_kept(refusal: Fault, times: int, pattern: str = POLL) -> None:
    """Assert that for one kind of refusal that is repeated so often."""
    async with field_of(speed=20) as field:
        room = field.server.room()
        await field.bot.run()
        with field.proxy.inject(refusal, pattern, times) as refused:
            room.say("this ends the poll before")
            await refused.happens()
            room.command(*range(3))
            await room.answers(*range(3))
            assert refused.happened == times
        assert "refused: starting from now" not in field.bot.log


@families
async def test_position_refused_while_the_bot_runs_costs_no_command(manners: Manners) -> None:
    """What came since is read back in the rooms of this life: a homeserver was set back, say."""
    async with field_of(manners, speed=60) as field:
        rooms = [field.server.room() for _ in range(3)]
        for room in rooms:
            room.command("old")
        await field.bot.run()
        rooms[1].set_membership("leave", ALICE)
        rooms[1].set_membership("invite", ALICE)
        await eventually(lambda: rooms[1].membership == "join")
        for room in rooms[:2]:
            room.command("before")
            await room.answers("before")
        rooms[2].say("no command")
        may_join = asyncio.Event()
        with field.proxy.inject(faults.hold(may_join.wait), JOIN) as joining:
            rooms.append(field.server.room("invite"))
            await joining.happens()
            await is_past(field, field.server.position)
            with field.proxy.inject(MALFORMED, POLL) as refused:
                rooms[0].say("this ends the poll before")
                await refused.happens()
                for room in rooms:
                    room.command("meanwhile")
                await field.bot.logs("refused: starting from now")
            for room in rooms:
                room.command("after")
            await rooms[0].answers("before", "meanwhile", "after")
            await field.proxy.counts(POLL, field.proxy.count(POLL) + 2)
            may_join.set()
        for room, before in zip(rooms, (["before"], ["before"], [], []), strict=True):
            await room.answers(*before, "meanwhile", "after")


@families
async def test_room_that_is_done_just_after_a_refused_position(manners: Manners) -> None:
    """Though it owes nothing any more when the position is given up, what came since is read."""
    async with field_of(manners, speed=60) as field:
        room, other = [field.server.room() for _ in range(2)]
        await field.bot.run()
        may_send, may_sync = asyncio.Event(), asyncio.Event()
        with field.proxy.inject(faults.hold(may_send.wait), SEND) as sending:
            room.command("before")
            await sending.happens()
            await is_past(field, field.server.position)
            with field.proxy.inject(MALFORMED, POLL) as refused:
                other.say("this ends the poll before")
                await refused.happens()
                room.command("meanwhile")
                await field.bot.logs("refused: starting from now")
            with field.proxy.inject(faults.hold(may_sync.wait), FIRST_SYNC) as syncing:
                may_send.set()
                await field.bot.logs(f" in {room.room_id}")
                await syncing.happens()
                may_sync.set()
        await room.answers("before", "meanwhile")


@families
async def test_kill_while_old_invitations_are_waited_for(manners: Manners) -> None:
    """What the first poll brought is not saved as done yet, and answered by the next life."""
    async with field_of(manners) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        room.command(*range(3))
        with field.proxy.inject(faults.silence, FIRST_SYNC) as waiting:
            await field.bot.start()
            await waiting.happens()
            await asyncio.sleep(0.3)  # There may be a save.
            await field.bot.kill()
        await field.bot.start()
        await room.answers(*range(3))


@families
async def test_stop_just_after_a_refused_position(manners: Manners) -> None:
    """With the next position the bot saves which rooms it will read back."""
    async with field_of(manners, speed=60) as field:
        room, other = [field.server.room() for _ in range(2)]
        await field.bot.run()
        room.command("before")
        await room.answers("before")
        await is_past(field, field.server.position)
        with field.proxy.inject(MALFORMED, POLL) as refused:
            other.say("this ends the poll before")
            await refused.happens()
            room.command("meanwhile")
            await field.bot.logs("refused: starting from now")
        # The poll without a position succeeds, the sync for old invitations does not.
        course = faults.in_turn(faults.delay(0), faults.silence)
        with field.proxy.inject(course, FIRST_SYNC) as syncing:
            await syncing.happens(2)
            await field.bot.kill()
        await field.bot.start()
        await room.answers("before", "meanwhile")


@families
async def test_joined_room_is_told_before_old_invitations(manners: Manners) -> None:
    """Kicked and invited again amid the old sync, a room that had news owes that, too."""
    async with field_of(manners) as field:
        room = field.server.room()
        room.say("known")
        await field.bot.run()
        await field.bot.kill()
        room.command("first")
        room.say(*["chat"] * 5)
        may_sync, may_join = asyncio.Event(), asyncio.Event()
        with (
            field.proxy.inject(faults.hold(may_sync.wait), FIRST_SYNC) as syncing,
            field.proxy.inject(faults.hold(may_join.wait), JOIN) as joining,
        ):
            await field.bot.start()
            await syncing.happens()
            room.set_membership("leave", ALICE)
            room.set_membership("invite", ALICE)
            may_sync.set()
            await joining.happens()
            room.command("second")
            room.say(*["chat"] * 110)
            may_join.set()
            await room.answers("first", "second")


async def test_old_invitations_that_come_late_undo_no_join() -> None:
    """A room that polls tell as joined is not left, though it was an invitation to be rejected."""
    async with field_of(speed=10) as field:
        field.bot.environment["MATRIX_INVITERS"] = "@nobody:*"
        await field.bot.run()
        await field.bot.kill()
        room, other = field.server.room("invite"), field.server.room()
        (field.bot.state / "next_batch").write_text(f"s{field.server.position}\n")
        may_come = asyncio.Event()

        with field.proxy.inject(faults.withhold(may_come.wait), FIRST_SYNC) as old:
            await field.bot.start()
            await old.happens()
            room.set_membership("join")
            room.command("first")
            await room.answers("first")
            may_come.set()
        await field.proxy.counts(POLL, field.proxy.count(POLL) + 2)
        other.command("hello")
        await other.answers("hello")
        room.command("second")
        await room.answers("first", "second")
        assert not field.proxy.count(LEAVE)


@families
@pytest.mark.parametrize("first", [ALICE, OWNER])
async def test_invited_again_amid_the_sync_for_old_invitations(
    manners: Manners, first: str
) -> None:
    """It is followed, whether the invitation that the first poll told was accepted or rejected."""
    async with field_of(manners) as field:
        field.bot.environment["MATRIX_INVITERS"] = ALICE
        await field.bot.run()
        await field.bot.kill()
        room = field.server.room("leave")
        room.set_membership("invite", first)
        may_sync = asyncio.Event()
        with field.proxy.inject(faults.hold(may_sync.wait), FIRST_SYNC):
            await field.bot.start()
            await field.bot.logs(f"invited by {first}")
            if first == ALICE:
                room.set_membership("leave", ALICE)
            room.set_membership("invite", ALICE)
            room.command("hello")
            may_sync.set()
            await room.answers("hello")


async def test_rejected_invitations_are_not_read_at_the_start() -> None:
    """However many there are, they hold up nobody."""
    async with field_of() as field:
        field.bot.environment["MATRIX_INVITERS"] = OWNER
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        rejected = [field.server.room("invite") for _ in range(500)]
        room.command("hello")
        with field.proxy.inject(faults.delay(4), FIRST_SYNC) as syncing:
            await field.bot.start()
            await room.answers("hello")
        assert syncing.happened
        await eventually(lambda: {each.membership for each in rejected} == {"leave"})
        assert not field.proxy.count(MESSAGES)


async def test_room_without_news_is_not_read_after_a_refused_position() -> None:
    """Told with an empty timeline, all it has is from before the first start."""
    async with field_of(speed=60) as field:
        room, other = [field.server.room() for _ in range(2)]
        room.command("before the first start")
        await field.bot.run()

        def unread(answer: JSON) -> JSON:
            answer["rooms"]["join"].setdefault(room.room_id, {"unread_notifications": {}})
            return answer

        with field.proxy.inject(faults.rewrite(unread), POLL) as telling:
            other.command("hello")
            await other.answers("hello")
            assert telling.happened
        await is_past(field, field.server.position)
        with field.proxy.inject(MALFORMED, POLL) as refused:
            other.say("this ends the poll before")
            await refused.happens()
            await field.bot.logs("refused: starting from now")
        other.command("after")
        await other.answers("hello", "after")
        room.command("new")
        await room.answers("new")


async def test_position_refused_for_a_minute_is_given_up_loudly() -> None:
    """The log names the position; what is said from then on is answered."""
    await together(*map(position_is_given_up, (MALFORMED, NOT_FOUND)))


async def position_is_given_up(refusal: Fault) -> None:
    """Assert that for one kind of refusal."""
    async with field_of(speed=60) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        position = field.bot.next_batch
        with field.proxy.inject(refusal, f"{POLL}{position}(&|$)") as refused:
            room.command("lost")
            await field.bot.start()
            await refused.happens()
            began = field.now()
            await field.bot.logs("refused: starting from now")
            assert 30 < field.now() - began < 200
            assert 3 < refused.happened < 20
            await field.bot.saves(other_than=position)
            room.command("new")
            await room.answers("new")
        (line,) = [line for line in field.bot.log.splitlines() if " ERROR " in line]
        assert f"next_batch {position}" in line


@pytest.mark.parametrize("status", [401, 403, 407])
async def test_refusal_of_a_proxy_costs_no_login(status: int) -> None:
    """A poll that is refused by what is no homeserver is repeated with the same token."""
    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        refusal = faults.answer(status, "<html>Sign in to the hotel's network</html>")
        with field.proxy.inject(refusal, POLL, times=3) as refused:
            room.command("hello")
            room.say("this ends the poll before")
            await room.answers("hello")
            await refused.happens(3)
        room.command("again")
        await room.answers("hello", "again")
        assert field.proxy.count(LOGIN) == 1


@pytest.mark.parametrize("moves", [False, True], ids=["same position", "another each time"])
async def test_polls_that_bring_the_same_at_once(moves: bool) -> None:
    """With the same chat line in each answer they are made at most twice a second."""
    answers: list[JSON] = []

    def repeat(answer: JSON) -> JSON:
        if not answers and not answer["rooms"]["join"]:
            return answer
        answers.append(answer)
        # As many zeros as answers make it another position, and yet the same one.
        position = answers[0]["next_batch"].replace("s", "s" + "0" * len(answers) * moves)
        return {**answers[0], "next_batch": position}

    async with field_of(holds_polls=False) as field:
        room = field.server.room()
        await field.bot.run()
        with field.proxy.inject(faults.rewrite(repeat), POLL) as repeated:
            await repeated.happens()
            room.say("nothing to answer")
            await eventually(lambda: answers)
            began = field.now()
            await asyncio.sleep(4)  # The time in which it might rush.
            assert 4 <= len(answers) <= 2 * (field.now() - began) + 2
        room.command("after")
        await room.answers("after", seconds=5)


async def test_polls_that_return_at_once() -> None:
    """With nothing new, or for an invitation told in each: they are made at most twice a second."""
    await together(
        polls_make_no_rush("*", holds_polls=False),
        polls_make_no_rush("*", repeats_invitations=True),
        polls_make_no_rush(OWNER, repeats_invitations=True),
    )


async def polls_make_no_rush(inviters: str, **manners: bool) -> None:
    """Assert that of one reason, while an invitation can be neither accepted nor rejected."""
    async with field_of(SYNAPSE, **manners) as field:
        field.bot.environment["MATRIX_INVITERS"] = inviters
        good = field.server.room()
        await field.bot.run()
        with field.proxy.inject(FORBIDDEN, LEAVE if inviters == OWNER else JOIN) as refused:
            field.server.room("invite")
            await refused.happens()
            before, began = field.proxy.count(SYNC), field.now()
            await asyncio.sleep(5)  # The time in which it might rush.
            assert field.proxy.count(SYNC) - before <= 2 * (field.now() - began) + 2
            assert refused.happened < 10
            good.command("hello")
            await good.answers("hello", seconds=5)


async def test_busy_stream_is_not_slowed() -> None:
    """40 commands, each said when the one before was answered, take less than 15 s."""
    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        began = field.now()
        for n in range(40):
            room.command(n)
            await room.answers(*range(n + 1))
        assert field.now() - began < 15


async def test_room_joined_in_part_is_answered() -> None:
    """Of a large room of others, which the homeserver is still joining, commands are news."""
    async with field_of() as field:
        room = field.server.room("invite")
        room.is_joined_in_part = True
        await field.bot.run()
        await field.bot.logs("Joined")
        room.command("hello")
        await room.answers("hello")
