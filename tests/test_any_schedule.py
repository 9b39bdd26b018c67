"""Whatever happens and in whatever order, every command is answered once and in order.

ECHOBOT_EXAMPLES=500 tries so many new schedules instead of the same few. One that fails is shown as
Schedule(...): to replay it, put @example(Schedule(...)) on the test.
"""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from support.bot import eventually
from support.federation import Federation
from support.proxy import EVERY_FAULT, Fault, Proxy, cut, done_but_silent, silence, stall
from support.scene import FarScene, new_far_scene, tries

SPEED = 30
SILENT = (silence, stall, done_but_silent)


@dataclass(frozen=True)
class Schedule:
    """What happens: methods of `Scene` with their arguments; what is left to chance is by seed."""

    seed: int
    steps: list[tuple[str, int]]


def step(name: str, least: int = 0, most: int = 0) -> st.SearchStrategy[tuple[str, int]]:
    """Return a strategy for a step with an argument from a range."""
    return st.tuples(st.just(name), st.integers(least, most))


SCHEDULES = st.builds(
    Schedule,
    seed=st.integers(0, 2**32),
    steps=st.lists(
        st.one_of(
            *[step("say", 1, 8), step("say", 1, 8), step("say", 11, 25), step("invite")],
            *[step("wait", 0, 1500), step("kill", 0, 1500), step("kill", 0, 200)],
            *[step("stop", 0, 1500), step("restart_homeserver"), step("crash_homeserver")],
            *[step("cut_off"), step("heal"), step("invite_from_afar")],
            *[step("hang", 1000, 5000), step("go_on")],
        ),
        min_size=8,
        max_size=14,
    ),
)


def any_fault(scene: FarScene, chance: random.Random, hits: list[str]) -> Fault:
    """Return a fault that hits a third of the requests, each in another way, and notes how.

    Not such as are an end, as the README says: four requests for a room that hang, each for longer,
    are ten minutes; and what the first read of a room has fetched from another homeserver seems to
    be known when it is repeated.
    """
    silences = Counter[str]()  # by room

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        if await scene.hangs(request):
            return cut(request)
        if chance.random() > 0.35 or request.query.get("limit") == "1":
            return await proxy.forward(request)
        name = chance.choice(list(EVERY_FAULT))
        room_id = request.path.partition("/rooms/")[2].partition("/")[0]
        if EVERY_FAULT[name] in SILENT and room_id:
            silences[room_id] += 1
            if silences[room_id] > 3:
                return await proxy.forward(request)
        hits.append(name)
        return await EVERY_FAULT[name](proxy, request)

    return fault


@pytest.mark.long
@tries(few=3)
@given(SCHEDULES)
async def test_any_schedule(federation: Federation, schedule: Schedule) -> None:
    """Commands in several rooms of two homeservers, that are cut off from each other or restart.

    A third of all requests is hit by faults, a room hangs, the bot is killed.
    """
    async with new_far_scene(federation, SPEED, schedule.seed) as scene:
        scene.proxy.timeline_limit = 10
        try:
            hits: list[str] = []
            with scene.proxy.inject(any_fault(scene, random.Random(schedule.seed), hits)):
                for name, argument in schedule.steps:
                    await getattr(scene, name)(argument)
                await scene.go_on(0)
                await scene.heal(0)
                await scene.say(1)
                await scene.start()
                # What bob said amid a join comes only with what he says after it.
                for room in filter(scene.due, scene.far_rooms):
                    await eventually(room.is_full, what="an end of the join")
                    await scene.say_in(room)
                await eventually(scene.is_all_answered, 100, "a reply to each command")
                # The bot polls on, so that one comes for sure.
                await eventually(lambda: hits)
            # Replies to what comes last, after one more crash, come after all that is done twice.
            await scene.kill(0)
            await scene.start()
            await scene.say_everywhere(1)
            await scene.check(60)
            devices = {scene.people.account.device_id, scene.bot.session["device_id"]}
            assert await scene.people.account.devices() == devices
        except BaseException:
            print(f"{schedule}\n{scene.bot.log}")
            for each in scene.rooms:
                print(f"{each.room_id}: {await scene.replies(each)} instead of {scene.due(each)}")
            raise
