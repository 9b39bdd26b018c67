"""What a room still owes costs only itself, and no crash loses or doubles any of it."""

import asyncio
import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import support.proxy as faults
from support.bot import Bot, eventually, fork, together
from support.people import Room as PeoplesRoom
from support.proxy import FIRST_SYNC, JOIN, MESSAGES, POLL, SEND, SYNC, Proxy
from support.scripted import ALICE, FAMILIES, Field, Manners, Room, field_of

families = pytest.mark.parametrize("manners", FAMILIES.values(), ids=FAMILIES)
MEANWHILE = [[], ["chat"], ["!replybot x", "chat"], [f"!replybot {n}" for n in range(12)]]
TROUBLES = {
    "sends hang": (SEND, faults.silence),
    "join hangs": ("/join", faults.silence),
    "join's answer is lost": ("/join", faults.done_but_silent),
}


def of(room: Room, pattern: str) -> str:
    """Return the pattern of those requests that are about a room."""
    return f"(?=.*{re.escape(room.room_id[1:].partition(':')[0])}\\W).*{pattern}"


async def is_past(field: Field, position: int) -> None:
    """Wait until a position or a later one is saved."""
    await eventually(lambda: int(field.bot.next_batch.split()[0][1:]) >= position)


@families
@pytest.mark.parametrize("trouble", TROUBLES)
async def test_one_room_that_hangs_costs_only_itself(manners: Manners, trouble: str) -> None:
    """After 50 syncs with commands elsewhere and a kill, only that room is read again, in order."""
    pattern, fault = TROUBLES[trouble]
    async with field_of(manners) as field:
        bad, *good = [field.server.room("leave") for _ in range(4)]
        for room in (bad, *good) if pattern == SEND else good:
            room.set_membership("join")
        await field.bot.run()
        with field.proxy.inject(fault, of(bad, pattern)) as hanging:
            if pattern != SEND:
                bad.command("history")
                bad.set_membership("invite", ALICE)
            bad.command(*range(3))
            await hanging.happens()
            for n in range(50):
                good[n % 3].command(n)
                if n % 10 == 0:
                    bad.command(3 + n // 10)
                await good[n % 3].answers(*range(n % 3, n + 1, 3))
            await is_past(field, field.server.position - 3)
            await eventually(lambda: field.bot.unfinished.keys() <= {bad.room_id})
            await field.bot.kill()
        asked = len(field.proxy.requests)
        await field.bot.start()
        await bad.answers(*range(8), seconds=30)
        for n, room in enumerate(good):
            room.command("after")
            await room.answers(*range(n, 50, 3), "after")
        read = [request for request in field.proxy.requests[asked:] if re.search(MESSAGES, request)]
        # Where only the answer was lost, a sync told before the kill that the bot has joined.
        assert read or fault is faults.done_but_silent
        assert all(re.search(of(bad, MESSAGES), request) for request in read)


@families
@pytest.mark.parametrize("is_saved", [True, False], ids=["saved", "disk full"])
async def test_replies_are_not_doubled_where_transactions_are_forgotten(
    manners: Manners, is_saved: bool
) -> None:
    """Neither what was answered while another room hung, nor the last one, whose answer is lost."""
    async with field_of(manners) as field:
        hanging, room = [field.server.room() for _ in range(2)]
        await field.bot.run()
        position = field.bot.next_batch
        with (
            field.proxy.inject(faults.silence, of(hanging, SEND)) as hangs,
            field.proxy.inject(faults.delay(0), SEND, times=70) as sends,
            field.proxy.inject(faults.done_but_silent, SEND) as lost,
        ):
            hanging.command("first")
            await hangs.happens()
            room.command(*range(71))
            await lost.happens()
            await eventually(lambda: len(room.replies) == 71)
            assert sends.happened == 70
            await field.bot.kill()
        field.server.transactions.clear()
        if not is_saved:
            (field.bot.state / "next_batch").write_text(position)
        await field.bot.start()
        room.command("after")
        await room.answers(*range(71), "after")
        await hanging.answers("first")


@families
@pytest.mark.parametrize("is_limited", [True, False], ids=["limited", "whole"])
async def test_kicked_and_invited_again_in_one_downtime(manners: Manners, is_limited: bool) -> None:
    """Of commands before, between and after, the first and the last are answered, in order."""
    count = 60 if is_limited else 2
    first, between, last = [range(n * count, (n + 1) * count) for n in range(3)]
    async with field_of(manners) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        room.command(*first)
        room.set_membership("leave", ALICE)
        room.command(*between)
        room.set_membership("invite", ALICE)
        room.command(*last)
        await field.bot.start()
        await room.answers(*first, *last)
        room.command("after")
        await room.answers(*first, *last, "after")


@families
async def test_room_with_a_gap_moves_on_with_each_reply(manners: Manners) -> None:
    """What was answered when a limited timeline came is not read again, nor after a kill."""
    async with field_of(manners, timeline_limit=10) as field:
        room = field.server.room()
        await field.bot.run()
        may_send = asyncio.Event()
        with field.proxy.inject(faults.hold(may_send.wait), SEND, times=1) as sending:
            room.command("first")
            await sending.happens()
            position = field.server.position
            room.command(*range(12))
            await is_past(field, field.server.position)
            with field.proxy.inject(faults.silence, SEND) as hanging:
                may_send.set()
                await hanging.happens()
                saved = field.bot
                await eventually(lambda: saved.unfinished.get(room.room_id) == f"s{position}")
                await field.bot.kill()
        await field.bot.start()
        await room.answers("first", *range(12))


@families
async def test_invited_again_while_a_reply_is_sent(manners: Manners) -> None:
    """What is said before the join counts, though the room had a reply to wait for in between."""
    kinds = itertools.product(MEANWHILE, (5, 1000))
    await together(*(all_is_answered(manners, *kind) for kind in kinds))


async def all_is_answered(manners: Manners, meanwhile: list[str], limit: int) -> None:
    """Assert that where this was said before the invitation, with timelines so long."""
    texts = ["first", *(t.removeprefix("!replybot ") for t in meanwhile if t != "chat")]
    sent, may_join = asyncio.Event(), asyncio.Event()

    async with field_of(manners, timeline_limit=limit) as field:
        room, other = [field.server.room() for _ in range(2)]
        await field.bot.run()
        with (
            field.proxy.inject(faults.withhold(sent.wait), of(room, SEND), times=1) as sending,
            field.proxy.inject(faults.hold(may_join.wait), of(room, JOIN), times=1) as joining,
        ):
            room.command("first")
            await sending.happens()
            await room.answers("first")
            room.say(*meanwhile)
            await is_past(field, field.server.position)
            room.set_membership("leave", ALICE)
            room.set_membership("invite", ALICE)
            await joining.happens()
            room.command(*range(3))
            sent.set()
            other.command("hello")
            await other.answers("hello")
            room.command(*range(3, 5))
            may_join.set()
            await room.answers(*texts, *range(5))


@families
async def test_joined_before_the_old_invitations_are_known(manners: Manners) -> None:
    """At a start, what is said before the join counts, though its timeline begins there."""
    may_join, may_sync = asyncio.Event(), asyncio.Event()
    async with field_of(manners) as field:
        await field.bot.run()
        await field.bot.kill()
        room = field.server.room("invite")
        with (
            field.proxy.inject(faults.hold(may_sync.wait), FIRST_SYNC),
            field.proxy.inject(faults.rewrite(begin_with_the_join), POLL),
            field.proxy.inject(faults.hold(may_join.wait), JOIN) as joining,
        ):
            await field.bot.start()
            await joining.happens()
            room.command("meanwhile")
            room.say(*["chat"] * 20)
            may_join.set()
            await field.bot.logs("Joined")
            may_sync.set()
            room.command("after")
            await room.answers("meanwhile", "after")


@families
async def test_notice_that_an_invitation_interrupts(manners: Manners) -> None:
    """That a room is encrypted is told after the join, if it could not be told before."""
    async with field_of(manners) as field:
        room = field.server.room()
        await field.bot.run()
        with field.proxy.inject(faults.internal_error, SEND) as failing:
            room.add("m.room.encrypted", ALICE, {})
            await failing.happens()
            room.set_membership("leave", ALICE)
            room.set_membership("invite", ALICE)
            await field.bot.logs("Joined")
        room.add("m.room.encrypted", ALICE, {})
        room.command("hello")
        await eventually(lambda: len(room.replies) > 1)
        assert "encrypted" in room.replies[0]
        assert room.replies[1:] == ["hello"]


@families
async def test_join_that_hangs_over_a_restart(manners: Manners) -> None:
    """The room is not read before it is joined: Conduit would hide that afterwards."""
    async with field_of(manners) as field:
        room, other = field.server.room("leave"), field.server.room()
        await field.bot.run()
        may_join = asyncio.Event()
        with field.proxy.inject(faults.hold(may_join.wait), JOIN) as joining:
            room.set_membership("invite", ALICE)
            await joining.happens()
            room.command("first")
            await eventually(lambda: room.room_id in field.bot.unfinished)
            await field.bot.kill()
            await field.bot.start()
            await joining.happens(2)
            other.command("hello")
            await other.answers("hello")
            assert not field.proxy.count(of(room, MESSAGES))
            may_join.set()
            await room.answers("first")


async def test_what_comes_during_a_turn_is_not_read_back() -> None:
    """While a reply is under way, each timeline follows the one before."""
    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        may_send = asyncio.Event()
        with field.proxy.inject(faults.hold(may_send.wait), SEND, times=1) as sending:
            room.command("first")
            await sending.happens()
            for n in range(3):
                room.command(n)
                await is_past(field, field.server.position)
            may_send.set()
            await room.answers("first", *range(3))
        assert not field.proxy.count(MESSAGES)


# Makes of being cancelled, once, another error.
STUBBORN = """
asked = []
async def reply_to(event: RoomMessageText) -> str | None:
    asked.append(event.body)
    text = event.body.removeprefix(COMMAND).strip()
    if len(asked) == 1:
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            raise ValueError(event.body) from error
    return text
"""


@families
async def test_invited_again_while_a_reply_is_made_up(manners: Manners) -> None:
    """It is made up again after the join, whatever reply_to raised when it was cancelled."""
    async with field_of(manners) as field:
        field.bot.script = fork(field.bot.directory, STUBBORN)
        room = field.server.room()
        await field.bot.run()
        room.command("raise")
        await is_past(field, field.server.position)
        room.set_membership("leave", ALICE)
        room.set_membership("invite", ALICE)
        room.command("second")
        await room.answers("raise", "second")
        assert "Passed over" not in field.bot.log


# Silent, after a while, to what is no command.
SILENT = """
async def reply_to(event: RoomMessageText) -> str | None:
    if event.body.startswith(COMMAND):
        return event.body.removeprefix(COMMAND).strip()
    while not Path(os.environ["STATE_DIRECTORY"], "go").exists():
        await asyncio.sleep(0.05)
    return None
"""


def begin_with_the_join(answer: Any) -> Any:
    """Have timelines that the bot's own join is in begin there, as if nothing were left out."""
    for room in answer["rooms"].get("join", {}).values():
        events = room["timeline"]["events"]
        joins = [
            n for n, event in enumerate(events) if event["content"].get("membership") == "join"
        ]
        if joins:
            room["timeline"] = {"events": events[joins[-1] :], "limited": False}
    return answer


@families
async def test_invited_again_amid_a_silent_turn(manners: Manners) -> None:
    """What is said before the join counts, though no reply and no timeline says where to look."""
    may_join = asyncio.Event()
    async with field_of(manners) as field:
        room, other = [field.server.room() for _ in range(2)]
        field.bot.script = fork(field.bot.directory, SILENT)
        await field.bot.run()
        with (
            field.proxy.inject(faults.rewrite(begin_with_the_join), SYNC),
            field.proxy.inject(faults.hold(may_join.wait), of(room, JOIN), times=1) as joining,
        ):
            room.say("slow")
            await is_past(field, field.server.position)
            room.set_membership("leave", ALICE)
            room.set_membership("invite", ALICE)
            await joining.happens()
            room.command(*range(3))
            room.say(*["chat"] * 110)
            (field.bot.state / "go").touch()
            for n in range(2):
                other.command(n)
                await other.answers(*range(n + 1))
            may_join.set()
            await room.answers(*range(3))


# Notes what it is asked about.
TELLS = """
async def reply_to(event: RoomMessageText) -> str | None:
    text = event.body.removeprefix(COMMAND).strip()
    with Path(os.environ["STATE_DIRECTORY"], "asked").open("a") as file:
        print(text, file=file)
    return text
"""


@pytest.mark.others
@pytest.mark.speed(20)
async def test_command_redacted_while_it_waits_is_not_answered(
    room: PeoplesRoom, quick_bot: Bot, proxy: Proxy
) -> None:
    """It waited for another one's reply, and reply_to is not asked; what is behind it still is."""
    quick_bot.script = fork(quick_bot.directory, TELLS)
    await quick_bot.run()
    said = list[str]()
    with proxy.inject(faults.internal_error, SEND) as failing:
        for n in range(4):
            said.append(await room.command(n))
            await failing.happens()
        path = f"/rooms/{room.room_id}/redact/{said[2]}/{said[2]}"
        await room.user.request("PUT", path, {})
        await room.command(4)
        await proxy.counts(POLL, proxy.count(POLL) + 2)  # Then the redactions were told.
    assert await room.replies(4) == ["0", "1", "3", "4"]
    asked = (quick_bot.state / "asked").read_text().split()
    assert asked == ["0", "1", "3", "4"]


@families
async def test_redacted_command_of_the_same_timeline_is_not_answered(manners: Manners) -> None:
    """Nor does the redaction of an older one make others from before the first start news."""
    async with field_of(manners, timeline_limit=10) as field:
        room = field.server.room()
        old = room.command("old 0")
        room.command("old 1")
        await field.bot.run()
        may_send = asyncio.Event()
        with field.proxy.inject(faults.hold(may_send.wait), SEND, times=1) as sending:
            room.command("first")
            redacted = room.command("redacted")
            await sending.happens()
            for event_id in (old, redacted):
                room.add("m.room.redaction", ALICE, {"redacts": event_id}, redacts=event_id)
            await is_past(field, field.server.position)
            room.command(*range(12))
            await is_past(field, field.server.position)
            may_send.set()
            await room.answers("first", *range(12))


MEMBERSHIP_UNTOLD = replace(FAMILIES["synapse"], tells_membership=False)


@pytest.mark.parametrize(
    "manners", [*FAMILIES.values(), MEMBERSHIP_UNTOLD], ids=[*FAMILIES, "old synapse"]
)
async def test_killed_between_two_replies_far_from_the_invitation(manners: Manners) -> None:
    """What precedes the join counts, though only it and the first reply are read back."""
    await together(*(second_is_answered(manners, is_first) for is_first in (True, False)))


async def second_is_answered(manners: Manners, is_first_start: bool) -> None:
    """Assert that for an invitation from before the first start, or from a downtime."""
    async with field_of(manners) as field:
        room = field.server.room("leave")
        if not is_first_start:
            await field.bot.run()
            await field.bot.kill()
        room.set_membership("invite", ALICE)
        room.say(*["chat"] * 110)
        room.command("first")
        room.say(*["chat"] * 20)
        room.command("second")
        with (
            field.proxy.inject(faults.delay(0), SEND, times=1),
            field.proxy.inject(faults.silence, SEND) as hanging,
        ):
            await field.bot.start()
            await hanging.happens()
            await eventually(lambda: room.room_id in field.bot.unfinished)
            await field.bot.kill()
        await field.bot.start()
        await room.answers("first", "second")


async def test_room_ids_cannot_forge_what_is_saved() -> None:
    """An invitation to a room whose ID has lines in it is passed over, and saves no line."""
    async with field_of() as field:
        room = field.server.room()
        forged = f"!a:b\n{room.room_id} s999"

        def invite(answer: Any) -> Any:
            answer["rooms"].setdefault("invite", {})[forged] = {"invite_state": {"events": []}}
            return answer

        await field.bot.run()
        with field.proxy.inject(faults.rewrite(invite), SYNC) as forging:
            room.command("first", "second")
            await room.answers("first", "second")
            await forging.happens()
            await is_past(field, field.server.position)
            assert field.bot.saved[1:] == []
        assert "s999" not in field.bot.log
        room.command("third")
        await room.answers("first", "second", "third")


async def test_inviters_cannot_forge_what_is_saved() -> None:
    """An invitation by a user ID that has lines in it saves one line, and is followed."""
    async with field_of(speed=20) as field:
        await field.bot.run()
        with field.proxy.inject(faults.silence, JOIN) as joining:
            room = field.server.room("leave")
            room.set_membership("invite", "@eve\n!victim s999:a.test")
            await joining.happens()
            await eventually(lambda: field.bot.unfinished)
            assert set(field.bot.unfinished) == {room.room_id}
        await eventually(lambda: room.membership == "join")


@families
async def test_position_of_a_room_that_is_refused(manners: Manners) -> None:
    """The room is read back to the bot's last reply in it: none is lost, none doubled."""
    async with field_of(manners) as field:
        room, other = [field.server.room() for _ in range(2)]
        await field.bot.run()
        room.command("history")
        await room.answers("history")
        with field.proxy.inject(faults.silence, of(room, SEND)) as hanging:
            room.command(*range(12))
            await hanging.happens()
            other.command("hello")
            await other.answers("hello")
            await is_past(field, field.server.position)
            await field.bot.kill()
        next_batch, line = field.bot.saved
        room_id, _ = line.split()
        assert room_id == room.room_id
        (field.bot.state / "next_batch").write_text(f"{next_batch}\n{room_id} garbage\n")
        await field.bot.start()
        await room.answers("history", *range(12))
        assert field.proxy.count(of(room, MESSAGES) + ".*from=garbage") > 0
