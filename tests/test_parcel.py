"""Adapters from elsewhere: what was exported comes back as it was, and nothing else gets in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as dump_safetensors

from servetune import clients
from servetune.adapters.parcel import CONFIG, LINEAGE, MANIFEST, WEIGHTS, dump_lineage, unpack
from servetune.adapters.policy import Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Sampling
from servetune.adapters.versions import ErasedQuery, UnfitAdapter, version_name
from servetune.server.engine import Engine
from servetune.server.settings import Settings
from tests.conftest import query
from tests.fakes import ADMIN, ADMIN_KEY, USER, USER_KEY, ZERO, World, learn
from tests.test_engine import LABELS, engine, engine_on, policy, publish, store  # noqa: F401

PATH = "/v1/adapters/default/import"
TAR = {"Content-Type": "application/x-tar"}
Files = dict[str, bytes]


def packed(files: Files, **options: Any) -> bytes:
    """A tar; `kind` is the type of its last member."""
    kind, buffer = options.pop("kind", tarfile.REGTYPE), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=options.pop("format", tarfile.USTAR_FORMAT)) as tar:
        for number, (name, content) in enumerate(files.items(), 1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if number == len(files) and kind != tarfile.REGTYPE:
                info.type, info.size, info.linkname = kind, 0, "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def plain(value: float = 0.5, **config: Any) -> Files:
    """A directory of plain PEFT that fits the fakes' model."""
    weights = {name: torch.full(each.shape, value) for name, each in ZERO[0].items()}
    return {WEIGHTS: dump_safetensors(weights), CONFIG: json.dumps(ZERO[1] | config).encode()}


def exported(store: AdapterStore, version: int) -> bytes:  # noqa: F811
    return b"".join(store.export(version))


# --- what is in a tar --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "./", "v0007/"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_a_directory_is_read_with_or_without_a_folder(folder: str, form: int) -> None:
    found = unpack(packed({folder + name: content for name, content in plain().items()}, format=form))
    assert found.weights.keys() == ZERO[0].keys()
    assert found.manifest is None
    assert found.config == ZERO[1]


@pytest.mark.parametrize(
    "name",
    ["../adapter_config.json", "/adapter_config.json", "a/b/adapter_config.json", "a/adapter_model.bin", "x.py"],
)
def test_other_names_are_refused_wherever_they_point(name: str) -> None:
    with pytest.raises(UnfitAdapter, match="pack these alone"):
        unpack(packed({WEIGHTS: plain()[WEIGHTS], name: b"{}"}))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_and_devices_are_refused(kind: bytes) -> None:
    with pytest.raises(UnfitAdapter, match="pack these alone"):
        unpack(packed({WEIGHTS: plain()[WEIGHTS], CONFIG: b""}, kind=kind))


def changed(name: str, content: bytes) -> bytes:
    return packed(plain() | {name: content})


@pytest.mark.parametrize(
    ("archive", "why"),
    [
        (b"", "lacks adapter_config.json and adapter_model.safetensors"),
        (b"\0" * 1024, "lacks"),
        (b"PK\3\4" + b"x" * 600, "damaged or no tar"),
        (packed(plain())[:520], "damaged"),
        (packed({WEIGHTS: b"x"}), "lacks adapter_config.json"),
        (packed({**plain(), f"a/{CONFIG}": b"{}"}), "pack these alone"),
        (changed(WEIGHTS, b"\x80\x04."), "does not read as safetensors"),
        (changed(WEIGHTS, b"\xff" * 64), "does not read as safetensors"),
        (changed(CONFIG, b"["), "does not read as a JSON object"),
        (changed(CONFIG, b"[" * 9000), "does not read as a JSON object"),
        (changed(CONFIG, b"[]"), "does not read as a JSON object"),
        (changed(CONFIG, b" " * 3_000_000), "too large"),
        (changed(MANIFEST, b"{}"), "does not read"),
    ],
)
def test_what_is_no_adapter_is_refused(archive: bytes, why: str) -> None:
    with pytest.raises(UnfitAdapter, match=why):
        unpack(archive)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_does_more_than_be_refused(data: st.DataObject) -> None:
    whole = bytearray(packed(plain()))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = unpack(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except UnfitAdapter:
        return
    assert isinstance(found.config, dict)


# --- what fits ---------------------------------------------------------------------------------------


def with_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Files:
    weights = change({name: value.clone() for name, value in ZERO[0].items()})
    return plain() | {WEIGHTS: dump_safetensors(weights)}


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (plain(r=4), "r in adapter_config.json is not 2"),
        (plain(lora_alpha=16), "lora_alpha in adapter_config.json is not 4"),
        (plain(use_dora=True), "no plain LoRA .use_dora"),
        (plain(peft_type="IA3", modules_to_save=["lm_head"]), "no plain LoRA .modules_to_save, peft_type"),
        (with_tensors(lambda _: {"another.lora_A.weight": torch.zeros(2, 2)}), "2 of its tensors do not fit"),
        (with_tensors(lambda w: {name: torch.zeros(2, 3) for name in w}), "some of its tensors do not fit"),
        (with_tensors(lambda w: {name: value + torch.nan for name, value in w.items()}), "not finite"),
        (with_tensors(lambda w: {name: value.int() for name, value in w.items()}), "not finite"),
    ],
)
def test_what_does_not_fit_says_what_to_do(files: Files, why: str, tmp_path: Path) -> None:
    made = AdapterStore(tmp_path)
    made.initialise(*ZERO)
    with pytest.raises(UnfitAdapter, match=why):
        made.check(unpack(packed(files)))


def test_an_export_for_another_base_or_that_was_changed_is_refused(tmp_path: Path) -> None:
    here, there = AdapterStore(tmp_path / "here"), AdapterStore(tmp_path / "there")
    here.initialise(*ZERO)
    there.initialise(ZERO[0], ZERO[1], "sha256:other", ZERO[3])
    archive = exported(there, learn(there, 1.0).version)
    with pytest.raises(UnfitAdapter, match="another base model: import it where that is served"):
        here.check(unpack(archive))
    ours = unpack(exported(here, learn(here, 1.0).version))
    here.check(ours)
    assert ours.manifest is not None
    files = plain(2.0) | {MANIFEST: json.dumps(asdict(ours.manifest)).encode()}
    with pytest.raises(UnfitAdapter, match="export it again"):
        unpack(packed(files))


def test_what_learned_from_an_erased_query_stays_out(tmp_path: Path) -> None:
    made = AdapterStore(tmp_path)
    made.initialise(*ZERO)
    parcel = unpack(exported(made, learn(made, 1.0).version))
    again = made.publish(parcel.draft((0.0,)))
    assert made.erase(["q_1"]).dropped == (1, again.version)
    with pytest.raises(ErasedQuery):
        made.publish(parcel.draft((0.0,)))


def test_an_export_says_what_its_line_learned_from(tmp_path: Path) -> None:
    """Erasing reaches an import of what learned from the query only by what it came from, and it stays out."""
    made = AdapterStore(tmp_path)
    made.initialise(*ZERO)
    for value in (1.0, 2.0):
        made.promote(learn(made, value).version)
    archives = [exported(made, number) for number in (2, made.snapshot("keep").version)]
    assert [unpack(each).query_ids for each in archives] == [("q_1", "q_2")] * 2
    copies = [made.publish(unpack(each).draft((0.0,))).version for each in archives]
    again = exported(made, copies[0])
    assert unpack(again).query_ids == ("q_1", "q_2"), "also from one home to the next"
    plain = made.publish(replace(unpack(archives[0]), manifest=None, query_ids=()).draft((0.0,)))
    assert made.erase(["q_1"]).dropped == (1, 2, 3, *copies, plain.version)
    assert made.versions() == [0]
    for archive in (*archives, again):
        with pytest.raises(ErasedQuery):
            made.publish(unpack(archive).draft((0.0,)))
    with pytest.raises(ErasedQuery, match="these weights learned"):
        made.publish(replace(unpack(archives[0]), manifest=None, query_ids=()).draft((0.0,)))


def test_an_export_that_does_not_say_what_it_learned_from_is_refused(tmp_path: Path) -> None:
    made = AdapterStore(tmp_path)
    made.initialise(*ZERO)
    for value in (1.0, 2.0):
        made.promote(learn(made, value).version)
    other = unpack(exported(made, 1))
    (made.folder / "v0001" / MANIFEST).write_text("damaged")
    archive = exported(made, 2)
    with pytest.raises(UnfitAdapter, match="does not say what it learned from"):
        unpack(archive)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {name.rpartition("/")[2]: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    for lineage in (b"", b"[]", b'{"query_ids": []}', dump_lineage(other.source, ["q_1"])):
        with pytest.raises(UnfitAdapter, match="does not say what it learned from"):
            unpack(packed(files | {LINEAGE: lineage}))


# --- there and back ----------------------------------------------------------------------------------


async def test_what_was_exported_answers_elsewhere_as_it_did(
    engine: Engine,  # noqa: F811
    policy: Policy,  # noqa: F811
    store: AdapterStore,  # noqa: F811
    tmp_path: Path,
) -> None:
    number = publish(policy, store, 3, temperature=1.5)
    before = await engine.answer(query(labels=LABELS), Sampling(), version_name(number))
    other = AdapterStore(tmp_path / "other", "elsewhere")
    policy.use(None)
    other.initialise(policy.zero_weights(), policy.peft_config(), "sha256:base", policy.probe())
    elsewhere = Engine(engine.stage, other, Settings(home=tmp_path))
    draft = await elsewhere.examine(unpack(exported(store, number)))
    made = other.publish(draft)
    assert (made.digest, made.origin, made.parent) == (store.manifest(number).digest, "import", 0)
    assert made.metadata == {"source": made.digest, "source_version": version_name(number)}
    assert other.live().version == 0
    other.promote(made.version)
    assert await elsewhere.refresh() == made.version, "the probe is the one that it must answer again"
    after = await elsewhere.answer(query(labels=LABELS), Sampling(), "live")
    assert (after.candidates, after.confidence) == (before.candidates, before.confidence)


async def test_an_import_answers_its_probe_or_is_refused(
    engine: Engine,  # noqa: F811
    policy: Policy,  # noqa: F811
    store: AdapterStore,  # noqa: F811
) -> None:
    parcel = unpack(exported(store, publish(policy, store, 3)))
    assert parcel.manifest is not None
    foreign = replace(parcel, manifest=replace(parcel.manifest, probe=(1.0, 2.0)))
    with pytest.raises(UnfitAdapter, match="does not answer its probe"):
        await engine.examine(foreign)
    unknown = await engine.examine(replace(parcel, manifest=None))
    assert unknown.probe == parcel.manifest.probe, "plain PEFT: what it answers here is what it must answer later"
    resident, _ = engine.residency()
    assert resident == [0], "examining takes no slot for good"


# --- over HTTP ---------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path, max_body_bytes=2000, max_import_bytes=20_000)
    made.client.headers.update(ADMIN)
    return made


async def test_an_import_is_a_version_that_is_not_live(world: World) -> None:
    reply = await world.client.post(PATH, content=packed(plain()), headers=TAR)
    made = reply.json()
    assert (reply.status_code, made["version"], made["origin"]) == (201, "v0003", "import")
    assert made["metadata"]["source"].startswith("sha256:")
    assert world.store.live().version == 2
    entry = world.audit.page(limit=1)[0][0]
    assert (entry.event, entry.details["made"]) == ("adapter_imported", "v0003")
    assert world.history.kinds() == ["import"]
    live = (await world.client.post(f"{PATH}?promote=true", content=packed(plain(0.7)), headers=TAR)).json()
    assert world.engine.serving == int(live["version"][1:]) == world.store.live().version == 4
    assert world.history.kinds() == ["import", "import", "promote", "swap"]


async def test_refused_imports_are_audited_and_change_nothing(world: World) -> None:
    reply = await world.client.post(PATH, content=packed(plain(r=4)), headers=TAR)
    assert (reply.status_code, reply.json()["code"]) == (422, "adapter_unfit")
    assert "lora_rank" in reply.json()["detail"]
    assert world.audit.page(limit=1)[0][0].details["refused"] == "adapter_unfit"
    reply = await world.client.post(PATH, json={})
    assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_media_type")
    assert world.store.versions() == [0, 1, 2]


async def test_only_an_administrator_may_send_more_than_a_question(tmp_path: Path) -> None:
    world = World(tmp_path, user_keys=(USER_KEY,), max_body_bytes=2000, max_import_bytes=20_000)
    for size, headers, status in (
        (10_000, ADMIN, 422),
        (20_001, ADMIN, 413),
        (10_000, USER, 413),
        (10_000, {}, 413),
        (1_000, USER, 403),
    ):
        reply = await world.client.post(PATH, content=b"x" * size, headers=headers | TAR)
        assert reply.status_code == status, (size, headers)
    reply = await world.client.post("/v1/answer", content=b"x" * 10_000, headers=ADMIN | TAR)
    assert reply.status_code == 413, "it is about files, not about who"


async def test_the_sdk_packs_a_directory(world: World, tmp_path: Path) -> None:

    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in plain().items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("is left out")
    transport = httpx2.ASGITransport(app=world.app)
    async with clients.AsyncClient("http://localhost", admin_key=ADMIN_KEY, transport=transport) as client:
        made = await client.adapters.import_adapter(folder)
        assert (made.origin, made.version, world.store.live().version) == ("import", "v0003", 2)
        out = await client.adapters.export(made.version, tmp_path / "out")
        again = await client.adapters.import_adapter(out, promote=True)
        assert (again.digest, again.metadata["source_version"]) == (made.digest, "v0003")
        assert world.store.live().version == 4
        with pytest.raises(FileNotFoundError, match="lacks adapter_config"):
            await client.adapters.import_adapter(tmp_path)
