"""Is it helping? Feedback, kept queries, blind pairs, the gain with its interval, and what versions differ in."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from PIL import Image

from servetune.adapters.family import Family
from servetune.adapters.paired import Z95, difference_interval, gain
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Sampling
from servetune.clients.types import NextPair, Review, VersionDiff
from servetune.server import comparison, review
from servetune.server.cipher import Cipher
from servetune.server.lines import Line
from servetune.server.receipts import Receipts
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS
from servetune.server.valkey import EmbeddedValkey
from tests.conftest import query
from tests.fakes import ADMIN, USER, USER_KEY, World, base64_png, until
from tests.redis_servers import make_query, open_buffer, open_stream, running
from tests.test_engine import engine_on, publish

OTHER_KEY = "stu_another.0000000000000000000000000000"
OTHER = {"Authorization": f"Bearer {OTHER_KEY}"}
ADAPTER = "/v1/adapters/default"
PAIR = "v0000 v0002"
adapters = (f"line{number}" for number in range(10_000))


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(
        tmp_path, user_keys=(USER_KEY, OTHER_KEY), adapter_keys={"tenant": ["stu_tenant.00000000000000000"]}
    )
    made.client.headers.update(USER)
    made.buffer.reviews = True
    return made


def refused(reply: httpx2.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["code"]


# --- feedback ----------------------------------------------------------------------------------------


async def say(world: World, id: str, headers: dict[str, str] = USER, **said: Any) -> httpx2.Response:
    return await world.client.post(f"/v1/answers/{id}/feedback", json=said, headers=headers)


@pytest.mark.parametrize(
    ("said", "correct"),
    [
        ({"correct": True}, True),
        ({"correct": False}, False),
        ({"answer": "Thing."}, True),  # in its canonical form
        ({"answer": "a bird"}, False),
        ({"answer": "a bird", "correct": True}, True),
    ],
)
async def test_feedback_is_counted_for_the_version_that_answered(
    world: World, said: dict[str, Any], correct: bool
) -> None:
    answer = (await world.ask(adapter="v0001")).json()
    reply = (await say(world, answer["id"], **said)).json()
    assert reply == {"id": answer["id"], "adapter": "default", "version": "v0001", "correct": correct}
    status = (await world.client.get("/v1/adaptation", headers=ADMIN)).json()
    count = {"correct": int(correct), "incorrect": int(not correct)}
    assert status["buffer"]["feedback"] == {"v0001": count}
    metrics = (await world.client.get("/metrics")).text
    assert (
        f'servetune_feedback_total{{adapter="default",kind="correct",version="v0001"}} {count["correct"]}'
        in metrics
    )


async def test_only_the_key_that_asked_may_say(world: World) -> None:
    id = (await world.ask()).json()["id"]
    absent = await say(world, "ans_1", correct=True)
    another = await say(world, id, OTHER, correct=True)
    assert refused(absent) == refused(another) == (404, "answer_not_found")
    assert absent.json()["detail"] == another.json()["detail"]
    assert refused(await say(world, id, ADMIN, correct=True)) == (404, "answer_not_found")
    changed = id[:-40] + ("0" if id[-40] != "0" else "1") + id[-39:]
    assert refused(await say(world, changed, correct=True)) == (404, "answer_not_found")
    assert world.buffer.said == {}
    assert (await say(world, id, correct=True)).status_code == 200


async def test_a_tenant_s_answers_are_their_adapter_s(world: World) -> None:
    await world.client.post("/v1/adapters", json={"name": "tenant"}, headers=ADMIN)
    tenant = {"Authorization": "Bearer stu_tenant.00000000000000000"}
    world.client.headers.update(tenant)
    answer = (await world.ask()).json()
    assert (await say(world, answer["id"], tenant, correct=False)).json()["adapter"] == "tenant"
    assert world.buffer.said == {}
    assert len(world.buffer.others["tenant"].said) == 1


async def test_nothing_is_kept_of_an_answer_until_something_is_said_of_it(world: World) -> None:
    answer = (await world.ask(adapt=False)).json()
    assert (world.buffer.kept, world.buffer.reviewed, world.buffer.said) == ({}, {}, {})
    assert (await say(world, answer["id"], answer="a thing")).json()["correct"] is True
    assert list(world.buffer.said.values()) == [("v0002", True)], "and then a version and a yes"


async def test_the_last_word_counts_and_a_completion_takes_feedback_too(world: World) -> None:
    image = {"type": "image_url", "image_url": {"url": base64_png()}}
    message = {"role": "user", "content": [{"type": "text", "text": "what?"}, image]}
    body = {"model": "default", "messages": [message]}
    id = (await world.client.post("/v1/chat/completions", json=body)).json()["id"]
    assert (await say(world, id, correct=True)).json()["id"] == id
    assert (await say(world, id, correct=False)).json()["correct"] is False
    assert list(world.buffer.said.values()) == [("v0002", False)]


@pytest.mark.parametrize("body", [{}, {"correct": "yes"}, {"correct": None}, {"answer": " "}, {"text": "a"}])
async def test_feedback_that_says_nothing_is_refused(world: World, body: dict[str, Any]) -> None:
    id = (await world.ask()).json()["id"]
    assert refused(await say(world, id, **body)) == (422, "invalid_request")


async def test_without_redis_feedback_is_refused_and_may_be_said_again(world: World) -> None:
    id = (await world.ask()).json()["id"]
    world.buffer.down = True
    reply = await say(world, id, correct=True)
    assert (*refused(reply), reply.headers["retry-after"]) == (503, "buffer_unavailable", "1")
    world.buffer.down = False
    assert (await say(world, id, correct=True)).status_code == 200


async def test_an_answer_takes_feedback_for_thirty_days(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    id = (await world.ask()).json()["id"]
    monkeypatch.setattr(review, "FEEDBACK_S", -1.0)
    assert refused(await say(world, id, correct=True)) == (404, "answer_not_found")


def test_a_receipt_is_read_only_with_its_key() -> None:
    written = Receipts(Cipher(bytes(32)))
    id = written.write("ann", "default", 7, "A dog.")
    receipt = written.read(id, "ann", ["other", "default"])
    assert receipt
    assert (receipt.adapter, receipt.version) == ("default", 7)
    assert written.is_answer(receipt, "dog")
    assert not written.is_answer(receipt, "cat")
    assert written.read(id, "bob", ["default"]) is None
    assert written.read(id, "ann", ["other"]) is None
    assert Receipts(Cipher(bytes([1]) * 32)).read(id, "ann", ["default"]) is None


async def test_feedback_is_no_part_of_what_is_learned_from(world: World) -> None:
    answer = (await world.ask()).json()
    before = dict(world.buffer.kept)
    await say(world, answer["id"], answer="a bird")
    assert world.buffer.kept == before
    assert "bird" not in str(vars(world.buffer))


# --- feedback and kept queries in a real store ----------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with running(tmp_path_factory.mktemp("home")) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, adapter=next(adapters), review_queries=3, lease_s=1.1)


async def test_each_answer_counts_once_however_often_it_is_said(
    server: EmbeddedValkey, settings: Settings
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        for is_correct in (True, True, False):
            await buffer.say("ans_1", "v0007", is_correct, 60)
        await buffer.say("ans_2", "v0007", True, 60)
        await buffer.say("ans_3", "v0012", True, 60)
        found = (await buffer.status()).feedback
        assert {version: (each.correct, each.incorrect) for version, each in found.items()} == {
            "v0007": (1, 1),
            "v0012": (1, 0),
        }


async def test_what_is_remembered_of_feedback_is_bounded(
    server: EmbeddedValkey, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("servetune.server.buffer.MOST_SAID", 5)
    monkeypatch.setattr("servetune.server.buffer.MOST_VERSIONS", 2)
    async with open_buffer(settings, server.url) as buffer:
        for number in range(20):
            await buffer.say(f"ans_{number}", f"v{number:04d}", number % 2 == 0, 60)
        assert set((await buffer.status()).feedback) == {"v0016", "v0017", "v0018", "v0019"}
        with redis.Redis.from_url(server.url) as client:
            keys = [key.decode() for key in client.scan_iter(f"servetune:{{{settings.adapter}}}:said:*")]
            assert sorted(key.rpartition(":")[2] for key in keys) == [f"ans_{number}" for number in range(15, 20)]
            assert all(0 < client.ttl(key) <= 60 for key in keys)


async def test_the_newest_queries_are_kept_and_outlive_learning(
    server: EmbeddedValkey, settings: Settings
) -> None:
    with open_stream(settings, server.url) as stream:
        async with open_buffer(settings, server.url) as buffer:
            for number in range(5):
                await buffer.put(make_query(number), "ann")
            stream.settle(stream.take(8, 1.0), "trained")
            status = await buffer.status()
            assert (status.waiting, status.pending, status.bytes, status.kept) == (0, 0, 0, 3)
            assert list(await buffer.recent(PAIR)) == ["q_4", "q_3", "q_2"]
            found = await buffer.recall("q_4")
            assert found
            assert found.images[0].tobytes() == make_query(4).images[0].tobytes()
            assert await buffer.recall("q_1") is None


async def test_by_default_none_are_kept_and_those_there_go(server: EmbeddedValkey, settings: Settings) -> None:
    assert Settings(home=settings.home).review_queries == 0
    async with open_buffer(settings, server.url) as buffer:
        await buffer.put(make_query(1), "ann")
        assert (await buffer.status()).kept == 1
    async with open_buffer(settings.model_copy(update={"review_queries": 0}), server.url) as buffer:
        await buffer.put(make_query(2), "ann")
        assert (await buffer.status()).kept == 0


async def test_bytes_of_kept_queries_are_bounded(server: EmbeddedValkey, settings: Settings) -> None:
    async with open_buffer(settings.model_copy(update={"review_bytes": 400}), server.url) as buffer:
        for number in range(3):
            await buffer.put(make_query(number), "ann")
        assert list(await buffer.recent(PAIR)) == ["q_2", "q_1"], "two of some 150 bytes"
        big = make_query(9)
        noise = Image.effect_noise((64, 64), 80).convert("RGB")
        await buffer.put(type(big)("q_9", (noise,), "what?"), "ann")
        assert list(await buffer.recent(PAIR)) == ["q_2", "q_1"], "what has no room takes nobody's"


async def test_withdrawing_and_purging_take_kept_queries_too(server: EmbeddedValkey, settings: Settings) -> None:
    with open_stream(settings, server.url) as stream:
        async with open_buffer(settings, server.url) as buffer:
            for number in range(3):
                await buffer.put(make_query(number), "ann")
            stream.settle(stream.take(1, 1.0), "trained")
            assert not await buffer.withdraw("q_0"), "it was learned from"
            assert await buffer.withdraw("q_1")
            assert list(await buffer.recent(PAIR)) == ["q_2"]
            await buffer.put(make_query(4), "ann")
            stream.settle(stream.take(8, 1.0), "trained")
            assert await buffer.purge() == 0
            assert await buffer.recent(PAIR) == {}
            assert await buffer.recall("q_4") is None
            with redis.Redis.from_url(server.url) as client:
                assert list(client.scan_iter(f"servetune:{{{settings.adapter}}}:kept:*")) == []


async def test_kept_queries_are_sealed_and_expire(server: EmbeddedValkey, settings: Settings) -> None:
    brief = settings.model_copy(update={"review_ttl_s": 1})
    async with open_buffer(brief, server.url) as buffer:
        await buffer.put(make_query(1, "a very secret question"), "ann")
        key = f"servetune:{{{settings.adapter}}}:kept:q_1"
        with redis.Redis.from_url(server.url) as client:
            assert b"secret" not in client.hget(key, "sealed")
            assert client.ttl(key) <= 1
        other = Settings(home=settings.home, adapter=settings.adapter, buffer_key="A" * 43 + "=")
        async with open_buffer(other, server.url) as without_the_key:
            assert await without_the_key.recall("q_1") is None
        async with asyncio.timeout(10):
            while (await buffer.status()).kept:
                await asyncio.sleep(0.05)
        assert await buffer.recall("q_1") is None


async def test_what_is_listed_lives_as_long_as_what_it_lists(server: EmbeddedValkey, settings: Settings) -> None:
    """Else a purge would not find what a longer `review_ttl_s` had kept."""
    for ttl_s in (100, 10):
        async with open_buffer(settings.model_copy(update={"review_ttl_s": ttl_s}), server.url) as buffer:
            await buffer.put(make_query(ttl_s), "ann")
            await buffer.say(f"ans_{ttl_s}", "v0001", True, ttl_s)
    with redis.Redis.from_url(server.url) as client:
        for name in ("recent", "sizes", "said"):
            assert client.ttl(f"servetune:{{{settings.adapter}}}:{name}") > 10, name


async def test_what_was_kept_and_erased_leaves_the_file_as_well(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, review_queries=8)

    def on_disk(query_id: str) -> bool:
        files = [path for path in (tmp_path / "valkey").rglob("*") if path.suffix in (".aof", ".rdb")]
        return any(f"kept:{query_id}".encode() in path.read_bytes() for path in files)

    with running(tmp_path) as own, open_stream(settings, own.url) as stream:
        async with open_buffer(settings, own.url) as buffer:
            for number in range(2):
                await buffer.put(make_query(number), "ann")
            stream.settle(stream.take(8, 1.0), "trained")
            assert on_disk("q_0")
            await buffer.withdraw("q_0")
            await buffer.compact()
            async with asyncio.timeout(20):
                while on_disk("q_0"):
                    await asyncio.sleep(0.05)
            assert on_disk("q_1")


async def test_marks_follow_one_another_and_are_counted_beyond_the_query(
    server: EmbeddedValkey, settings: Settings
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        for number in range(3):
            await buffer.put(make_query(number), "ann")
        assert not await buffer.mark("q_0", PAIR, "both"), "it was not compared"
        assert await buffer.mark("q_0", PAIR, "same")
        assert not await buffer.mark("q_0", PAIR, "different"), "a query is compared once"
        assert not await buffer.mark("q_0", PAIR, "only_new"), "there is nothing to choose"
        assert await buffer.mark("q_1", PAIR, "different")
        assert await buffer.mark("q_1", PAIR, "only_old")
        assert await buffer.mark("q_1", PAIR, "only_new"), "whoever erred may say so"
        assert not await buffer.mark("q_unknown", PAIR, "same")
        assert await buffer.recent(PAIR) == {"q_2": "", "q_1": "only_new", "q_0": "same"}
        assert await buffer.recent("v0001 v0002") == {"q_2": "", "q_1": "", "q_0": ""}
        await buffer.purge()
        marks = {mark: count for mark, count in (await buffer.review(PAIR)).items() if count}
        assert marks == {"same": 1, "different": 1, "only_new": 1}


async def test_nothing_of_reviews_lives_forever(server: EmbeddedValkey, settings: Settings) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await buffer.put(make_query(0), "ann")
        await buffer.mark("q_0", PAIR, "different")
        await buffer.say("ans_1", "v0001", True, 60)
        with redis.Redis.from_url(server.url) as client:
            prefix = f"servetune:{{{settings.adapter}}}:"
            forever = {
                key.decode().removeprefix(prefix) for key in client.scan_iter(f"{prefix}*") if client.ttl(key) < 0
            }
        assert forever == {"queries", "ledger", "clients", "bytes", "key", "feedback"}


# --- blind pairs ---------------------------------------------------------------------------------------


async def pair(world: World, **query: Any) -> NextPair:
    reply = await world.client.get(f"{ADAPTER}/review/pair", params=query, headers=ADMIN)
    assert reply.status_code == 200, reply.text
    return NextPair.model_validate(reply.json())


async def judge(world: World, id: str, choice: str) -> httpx2.Response:
    return await world.client.post(f"{ADAPTER}/review/judge", json={"id": id, "choice": choice}, headers=ADMIN)


async def asked(world: World, num: int) -> None:
    """So many questions, which the base answers otherwise than what is live."""
    world.engine.texts[0] = "a bird"
    for number in range(num):
        assert (await world.ask(question=f"what is number {number}?")).status_code == 200


async def test_a_pair_is_blind_and_comes_in_either_order(world: World) -> None:
    await asked(world, 24)
    seen, first = set(), set()
    for _ in range(24):
        found = await pair(world)
        assert found.pair
        assert found.pair.images[0].startswith("data:image/jpeg;base64,")
        assert {found.pair.first, found.pair.second} == {"a bird", "a thing"}
        assert not {"old", "new", "version"} & found.pair.model_dump().keys()
        seen.add(found.pair.id)
        first.add(found.pair.first)
        assert (await judge(world, found.pair.id, "both")).status_code == 200
    assert len(seen) == 24
    assert first == {"a bird", "a thing"}
    assert (await pair(world)) == NextPair(pair=None, left=0)


async def test_a_choice_counts_for_the_version_that_said_it(world: World) -> None:
    await asked(world, 12)
    for _ in range(12):
        found = (await pair(world)).pair
        assert found
        reply = await judge(world, found.id, "first" if found.first == "a thing" else "second")
    report = Review.model_validate(reply.json())
    assert (report.old, report.new, report.only_new, report.only_old, report.judged) == (
        "v0000",
        "v0002",
        12,
        0,
        12,
    )
    assert (report.kept, report.compared, report.different) == (12, 12, 12)
    assert (report.gain, report.high) == (1.0, 1.0)
    wilson = 12 / (12 + Z95**2)  # lower end of the share of 12 in 12: without ties it is the same question
    assert report.low == pytest.approx(2 * wilson - 1)


async def test_the_gain_is_that_of_all_compared_queries(world: World) -> None:
    await asked(world, 4)
    world.engine.texts[0] = "THING!"  # the same, in other words
    for number in range(4, 16):
        await world.ask(question=f"what is number {number}?")
    real, birds = world.engine.answer, {f"what is number {number}?" for number in range(4)}

    async def answer(query: Any, sampling: Any, choice: str, *more: Any) -> Any:
        world.engine.texts[0] = "a bird" if query.question in birds else "THING!"
        return await real(query, sampling, choice, *more)

    world.engine.answer = answer  # type: ignore[method-assign]
    while found := (await pair(world)).pair:
        assert found.question in birds
        await judge(world, found.id, "first" if found.first == "a thing" else "second")
    report = Review.model_validate((await world.client.get(f"{ADAPTER}/review", headers=ADMIN)).json())
    assert (report.compared, report.different, report.judged, report.gain) == (16, 4, 4, 0.25)


async def test_a_pair_is_skipped_but_not_forgotten(world: World) -> None:
    await asked(world, 2)
    first = (await pair(world)).pair
    assert first
    second = (await pair(world, skip=first.id)).pair
    assert second
    assert second.id != first.id
    await judge(world, second.id, "neither")
    again = (await pair(world)).pair
    assert again == first, "in the same order as before"


async def test_what_was_opted_out_is_never_kept(world: World) -> None:
    await world.ask(adapt=False)
    await world.client.post(
        "/v1/answer",
        json={"image": base64_png(), "question": "what?"},
        headers={"Servetune-Adapt": "false"},
    )
    assert world.buffer.reviewed == {}


async def test_erased_queries_are_shown_no_more(world: World) -> None:
    await asked(world, 1)
    found = (await pair(world)).pair
    assert found
    await world.client.post("/v1/adaptation/erase", json={"query_ids": [found.id]}, headers=ADMIN)
    assert await pair(world, old="base", new="v0001") == NextPair(pair=None, left=0)
    assert refused(await judge(world, found.id, "first")) == (404, "pair_not_found")
    await asked(world, 1)
    await world.client.post(f"{ADAPTER}/reset", json={"purge_buffer": True}, headers=ADMIN)
    assert world.buffer.reviewed == {}


async def test_looking_at_what_people_sent_is_on_record(world: World) -> None:
    await asked(world, 1)
    await pair(world)
    entry = world.audit.page(limit=1)[0][0]
    assert (entry.event, entry.details) == ("queries_shown", {"adapter": "default", "num": 1})


async def test_nobody_waits_for_a_comparison(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await asked(world, 3)
    before = len(world.engine.asked)
    world.engine.waiting = 1
    finding = asyncio.create_task(pair(world))
    await asyncio.sleep(0)
    world.engine.hold = asyncio.Event()
    asking = asyncio.create_task(world.ask(question="and this?"))
    await until(lambda: len(world.engine.asked) == before + 1)
    assert not finding.done()
    world.engine.hold.set()
    assert (await asking).status_code == 200
    world.engine.waiting = 0
    assert (await finding).pair
    choices = [choice for _, _, choice in world.engine.asked[before:]]
    assert choices == ["live", "v0000", "v0002"]
    world.engine.waiting = 1
    monkeypatch.setattr(comparison, "PATIENCE_S", 0.05)
    reply = await world.client.get(f"{ADAPTER}/review/pair", params={"new": "v0001"}, headers=ADMIN)
    assert (*refused(reply), reply.headers["retry-after"]) == (503, "queue_full", "1")


async def test_one_query_is_compared_at_a_time(world: World) -> None:
    await asked(world, 4)
    world.engine.hold, before = asyncio.Event(), len(world.engine.asked)
    both = [asyncio.create_task(pair(world)) for _ in range(2)]
    await until(lambda: len(world.engine.asked) == before + 1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(world.engine.asked) == before + 1
    world.engine.hold.set()
    assert all(each.pair for each in await asyncio.gather(*both))


async def test_unknown_versions_and_a_redis_that_is_down(world: World) -> None:
    for path in ("review", "review/pair", "diff"):
        reply = await world.client.get(f"{ADAPTER}/{path}", params={"old": "v0099"}, headers=ADMIN)
        assert refused(reply) == (404, "adapter_not_found")
    for path in ("review", "review/pair", "diff"):
        reply = await world.client.get(f"{ADAPTER}/{path}", params={"old": "v0002", "new": "live"}, headers=ADMIN)
        assert refused(reply) == (422, "invalid_request")
    world.buffer.down = True
    for path in ("review/pair", "diff"):
        reply = await world.client.get(f"{ADAPTER}/{path}", headers=ADMIN)
        assert refused(reply) == (503, "buffer_unavailable")


# --- the gain ------------------------------------------------------------------------------------------


def likelihood_score(wins: int, losses: int, num: int, difference: float) -> float:
    """Tango's statistic with the likeliest share of losses looked for, not solved for."""
    rest = num - wins - losses
    top = (1 - difference) / 2
    low, high = max(0.0, -difference), top

    def log_likelihood(q: float) -> float:
        parts = ((wins, q + difference), (losses, q), (rest, 1 - 2 * q - difference))
        return sum(count * math.log(max(share, 1e-300)) for count, share in parts if count)

    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if log_likelihood(left) < log_likelihood(right) else (low, right)
    q = (low + high) / 2
    return (wins - losses - num * difference) / math.sqrt(num * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("wins", "losses", "num"), [(12, 2, 50), (9, 9, 50), (1, 0, 20), (30, 15, 50)])
def test_the_interval_ends_where_the_score_says(wins: int, losses: int, num: int) -> None:
    low, high = difference_interval(wins, losses, num)
    assert low < (wins - losses) / num < high
    assert likelihood_score(wins, losses, num, low) == pytest.approx(Z95, abs=1e-3)
    assert likelihood_score(wins, losses, num, high) == pytest.approx(-Z95, abs=1e-3)


def test_the_interval_is_symmetric_and_never_without_width() -> None:
    low, high = difference_interval(0, 0, 30)
    assert low == pytest.approx(-high)
    assert high > 0.1
    assert difference_interval(12, 2, 50) == pytest.approx(
        tuple(-each for each in difference_interval(2, 12, 50)[::-1])
    )
    assert difference_interval(30, 0, 30) == pytest.approx((2 * 30 / (30 + Z95**2) - 1, 1.0))


def test_the_gain_is_scaled_and_impossible_counts_are_refused() -> None:
    share, low, high = gain(12, 2, 50, 100, 400)
    plain = difference_interval(12, 2, 50)
    assert (share, low, high) == pytest.approx((0.25 * 0.2, 0.25 * plain[0], 0.25 * plain[1]))
    for counts in [(1, 0, 0, 0, 0), (3, 3, 5, 5, 5), (1, 0, 5, 4, 9), (1, 0, 2, 4, 3), (-1, 0, 2, 2, 2)]:
        with pytest.raises(ValueError, match="counts"):
            gain(*counts)


# --- what two versions differ in -------------------------------------------------------------------------


async def differing(world: World, **query: Any) -> VersionDiff:
    reply = await world.client.get(f"{ADAPTER}/diff", params=query, headers=ADMIN)
    assert reply.status_code == 200, reply.text
    return VersionDiff.model_validate(reply.json())


async def test_a_diff_names_facts_numbers_and_changed_answers(world: World) -> None:
    await asked(world, 3)
    world.engine.texts[2] = "a thing"
    found = await differing(world, old="base", new="v0002", images=True)
    assert (found.old, found.new, found.compared, found.next_after) == ("v0000", "v0002", 3, None)
    assert found.facts["parent"].model_dump() == {"old": None, "new": "v0001"}
    assert found.facts["origin"].model_dump() == {"old": "base", "new": "worker"}
    assert [each.question for each in found.answers] == [f"what is number {number}?" for number in (2, 1, 0)]
    assert {(each.old, each.new) for each in found.answers} == {("a bird", "a thing")}
    assert found.answers[0].images[0].startswith("data:image/jpeg;base64,")
    assert (await differing(world, old="v0001", new="v0002")).answers == []
    bare = await differing(world, old="base", new="v0002", limit=0)
    assert (bare.compared, bare.answers, bare.next_after, bare.facts) == (0, [], None, found.facts)


async def test_a_diff_goes_on_where_it_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await asked(world, 3)
    ticks = iter(range(10**6))
    real = comparison.Comparison._quiet

    async def quiet(self: Any, line: Any, until: float) -> bool:
        return next(ticks) % 3 < 2 and await real(self, line, until)  # time for one query a request

    monkeypatch.setattr(comparison.Comparison, "_quiet", quiet)
    first = await differing(world, old="base")
    assert (len(first.answers), first.compared) == (1, 1)
    assert first.next_after == first.answers[0].query_id
    second = await differing(world, old="base", after=first.next_after)
    third = await differing(world, old="base", after=second.next_after)
    questions = [each.question for page in (first, second, third) for each in page.answers]
    assert questions == [f"what is number {number}?" for number in (2, 1, 0)]
    assert third.next_after is None


# --- with the real parts -----------------------------------------------------------------------------------


async def test_the_engine_answers_kept_queries_with_both_versions(
    tiny: Path, tmp_path: Path, server: EmbeddedValkey, settings: Settings
) -> None:
    policy = Policy(Family.load(str(tiny)), LoraSpec(4, 8), SLOTS)
    store = AdapterStore(tmp_path / "store")
    policy.use(None)
    store.initialise(policy.zero_weights(), policy.peft_config(), "sha256:base", policy.probe())
    versions = comparison.Versions(0, publish(policy, store, 7))
    engine = engine_on(policy, store, settings)
    await engine.start()
    try:
        async with open_buffer(settings, server.url) as buffer:
            for number in range(3):
                await buffer.put(query(number), "ann")
            line, comparing = Line(store, engine, buffer), comparison.Comparison(4)
            short = Sampling(max_tokens=4)
            plain = [await engine.answer(query(n), short, each) for n in range(3) for each in ("base", "v0001")]
            expected = sum(old.text != new.text for old, new in zip(plain[::2], plain[1::2], strict=True))
            found = await comparing.diff(line, versions, 20, None, False)
            assert (found.compared, len(found.answers), found.next_after) == (3, expected, None)
            assert expected, "a version that answers nothing otherwise would be no test"
            pair = (await comparing.next_pair(line, versions, None)).pair
            assert pair
            assert await comparing.judge(line, versions, pair.id, "neither")
            assert (await comparing.review(line, versions)).neither == 1
            assert engine.serving == 0, "what is compared is not served"
            assert engine.residency()[1] == {}, "and its lease ends"
    finally:
        engine.stop()
        await engine.stage.stop()
