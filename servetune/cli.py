"""The command `servetune`. The server is imported only by the commands that run it, when called."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NoReturn

import typer
from pydantic import ValidationError
from rich.live import Live

import servetune
from servetune import bench as benchmark
from servetune import render, watching
from servetune.clients import (
    AdaptationStatus,
    AdapterInfo,
    AdapterSettings,
    Answer,
    AuditEntry,
    Client,
    Erased,
    Feedback,
    ProbeSetInfo,
    Review,
    VersionDiff,
    VersionInfo,
)
from servetune.clients.client import DEFAULT_BASE_URL
from servetune.clients.types import Mode
from servetune.connect import (
    REFUSED,
    USAGE,
    AdminKeyOption,
    ApiKeyOption,
    OutputOption,
    UrlOption,
    command,
    connect,
    connect_async,
    explained,
    fail,
)
from servetune.evals import BASELINES, LEARNERS, Options, PaperOptions

SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    # A traceback with local variables would print keys.
    "pretty_exceptions_enable": False,
}
FIRST_STEPS = """\b
First steps:
  servetune serve                                start it, with a model of its own
  servetune answer photo.png "What is this?"     ask it, from another terminal
  servetune recognize photo.png -l cat -l dog    let it choose
  servetune watch                                see it learn from what it is asked
  servetune adapters rollback                    go back, should it not please

\b
Before going live:
  servetune doctor MODEL --data photos/          can it serve here, and has learning anything to gain?
  servetune eval photos/                         what learning does to accuracy (photos/<label>/*.png)
  servetune learn photos/ --labels cat,dog       learn before anyone asks
  servetune bench                                how much it answers, and how fast
  servetune config                               every setting, and where its value comes from

Every command has --help, and -o json for programs. Exit codes: 0 done, 1 refused, 2 usage, 3 no connection."""
VERSIONS = """\b
Examples:
  servetune adapters versions                    what was learned, and what the gate said
  servetune adapters snapshot before-summer      keep what is live, under a name
  servetune adapters promote before-summer       make it live again
  servetune adapters reset                       unlearn everything
  servetune adapters rebase                      begin again on another base model (offline)"""
app = typer.Typer(help=servetune.__doc__, epilog=FIRST_STEPS, **SETTINGS)
adapters = typer.Typer(
    help="Versions of an adapter: look at them, keep, move and export them.", epilog=VERSIONS, **SETTINGS
)
app.add_typer(adapters, name="adapters")
probes = typer.Typer(help="Labelled questions that the gate judges by, and nothing learns from.", **SETTINGS)
adapters.add_typer(probes, name="probes")


class Adapt(StrEnum):
    """What `--adapt` may be."""

    yes = "yes"
    no = "no"
    now = "now"


ModelArgument = Annotated[str | None, typer.Argument(help="`nano`, a folder or a hub id of a checkpoint.")]
HomeOption = Annotated[Path | None, typer.Option(help="All state lives here.")]
LineOption = Annotated[str | None, typer.Option(help="Name of the adapter line.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
RedisOption = Annotated[str | None, typer.Option(help="By default the embedded Valkey.")]
LearnerOption = Annotated[str | None, typer.Option(help="default, frequency, ttrv, majority or a control.")]
SeedOption = Annotated[int | None, typer.Option()]

LineOutputOption = Annotated[
    render.Output, typer.Option("--output", "-o", help="json: a line on stdout; table: for people.")
]

ImageArgument = Annotated[str, typer.Argument(help="A file, an https URL, a data: URI, or - for stdin.")]
ChoiceOption = Annotated[str | None, typer.Option(help="live, another alias, base or a version: v0007.")]
AdaptOption = Annotated[
    Adapt, typer.Option(help="May the server keep this query, and learn from it? now: also for its own answer.")
]
NoAdaptOption = Annotated[bool, typer.Option("--no-adapt", help="The same as --adapt no.")]
DeadlineOption = Annotated[float | None, typer.Option(help="With --adapt now: seconds to answer in.")]
NameOption = Annotated[str, typer.Option(help="The adapter.")]
MeantOption = Annotated[str | None, typer.Option(help="The adapter; by default the server's own.")]
VersionArgument = Annotated[str, typer.Argument(help="A version (v0007), an alias or base.")]


def main() -> None:
    """Entry point."""
    app()


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(servetune.__version__)
        raise typer.Exit


# --- processes ---------------------------------------------------------------------------------------


@app.command(
    epilog="""\b
Examples:
  servetune serve                                nano, on this machine alone, with an embedded Valkey and a worker
  servetune serve OpenGVLab/InternVL3-2B-hf --port 9000
  servetune config                               what it would start with, and where that comes from"""
)
def serve(
    model: ModelArgument = None,
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one.")] = None,
    home: HomeOption = None,
    adapter: LineOption = None,
    device: DeviceOption = None,
    redis_url: RedisOption = None,
    learner: LearnerOption = None,
    seed: SeedOption = None,
    worker: Annotated[bool | None, typer.Option(help="Start a worker beside the API.")] = None,
) -> None:
    """Answer questions and learn from them. Options not given come from SERVETUNE_* or servetune.toml."""
    _start("serve", locals())


@app.command()
def worker(
    model: ModelArgument = None,
    home: HomeOption = None,
    adapter: LineOption = None,
    device: DeviceOption = None,
    redis_url: RedisOption = None,
    learner: LearnerOption = None,
    seed: SeedOption = None,
) -> None:
    """Only learn, from the buffer and into the store that servers share."""
    _start("worker", locals())


@app.command()
def config(output: OutputOption = render.Output.table) -> None:
    """Every setting of the server as it is resolved here, and its source; of keys, whether they are set."""
    try:
        settings = importlib.import_module("servetune.server.settings")
        render.show(settings.resolved(), output)
    except ModuleNotFoundError as error:
        _explain_missing(error)
    except ValidationError as error:
        _explain_settings(error)


def _start(role: str, options: dict[str, Any]) -> None:
    flags = {name: value for name, value in options.items() if value is not None}
    try:
        getattr(importlib.import_module("servetune.server.main"), role)(**flags)
    except ModuleNotFoundError as error:
        _explain_missing(error)
    except ValidationError as error:
        _explain_settings(error)


@app.command(
    name="eval",
    epilog="""\b
Examples:
  servetune eval photos/                         photos/<label>/*.png
  servetune eval questions.jsonl                 {"image", "question", "answer"} in each line
  servetune eval openmoji --compare ttrv         a built-in stream; the published learner beside the default""",
)
def evaluate(
    data: Annotated[
        str | None,
        typer.Argument(
            help="An image folder (label/*.png), a JSONL file, a built-in stream, or paper with --root."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="`nano`, a folder or a hub id of a checkpoint.")] = "nano",
    task: Annotated[str | None, typer.Option(help="recognition or vqa; by default as the data says.")] = None,
    learner: Annotated[
        str, typer.Option(help="A learner, a baseline, or frozen for the model alone.")
    ] = "default",
    compare: Annotated[
        list[str] | None, typer.Option(help="Another learner to run beside it; repeatable.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="Unlabeled queries to learn from: all or a number; for paper 1,20,500.")
    ] = None,
    order: Annotated[str, typer.Option(help="shuffled, or stream for the order of the data.")] = "shuffled",
    split: Annotated[
        str, typer.Option(help="file (and label beside it), label, or whole: also what was learned.")
    ] = "file",
    num_options: Annotated[
        int | None, typer.Option("--options", min=2, max=26, help="Ask recognition by letter, among so many.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Default 5; 20 for 1 or 20 samples; 1 for paper.")
    ] = None,
    adapt_on: Annotated[str | None, typer.Option(help="With --test-on: learn from this data set.")] = None,
    test_on: Annotated[str | None, typer.Option(help="Measure transfer to this data set.")] = None,
    source: Annotated[str | None, typer.Option(help="Data of the domain the model comes from.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for JSON, table and plots.")] = Path("eval-out"),
    fresh: Annotated[bool, typer.Option(help="Do not resume: run again what is finished.")] = False,
    root: Annotated[Path | None, typer.Option(help="For paper: the folder of data set folders.")] = None,
    datasets: Annotated[str | None, typer.Option(help="For paper: only these, with commas.")] = None,
    output: LineOutputOption = render.Output.json,
) -> None:
    """Measure what learning does to accuracy, with the frozen model beside it. Last line: JSON."""
    if (data is None) == (adapt_on is None):
        fail("name the DATA to learn from: servetune eval DATA, or --adapt-on A --test-on B", USAGE)
    _choose("--task", task, (None, "recognition", "vqa"))
    _choose("--order", order, ("shuffled", "stream"))
    _choose("--split", split, ("file", "label", "whole"))
    for each in (learner, *(compare or ())):
        _choose("a learner", each, (*LEARNERS, *BASELINES))
    if data == "paper":
        others = {
            "--task": task,
            "--options": num_options,
            "--test-on": test_on,
            "--source": source,
            "--split": None if split == "file" else split,
            "--order": None if order == "shuffled" else order,
        }
        for name in (name for name, value in others.items() if value is not None):
            fail(f"paper has a protocol of its own and does not take {name}", USAGE)
        if root is None:
            fail("name the folder of data set folders: servetune eval paper --root DIR", USAGE)
        _last_line(
            "paper",
            output,
            PaperOptions(
                root=root,
                model=model,
                datasets=tuple((datasets or "").replace(",", " ").split()),
                samples=tuple(_count(each) for each in (samples or "1,20,500").split(",")),
                learners=(learner, *(compare or ())),
                seeds=seeds or 1,
                out=out,
                fresh=fresh,
            ),
        )
        return
    if root is not None or datasets is not None:
        fail("--root and --datasets belong to: servetune eval paper", USAGE)
    count = None if samples in (None, "all") else _count(samples)
    options = Options(
        data=str(data or adapt_on),
        model=model,
        task=task,
        learner=learner,
        compare=tuple(compare or ()),
        samples=count,
        order=order,
        split=split,
        seeds=seeds or (20 if count and count <= 20 else 5),
        out=out,
        test_on=test_on,
        source=source,
        fresh=fresh,
        num_options=num_options,
    )
    _last_line("command", output, options)


@app.command(
    epilog="""\b
Examples:
  servetune learn photos/ --labels cat,dog --budget 10m
  servetune learn questions.jsonl                {"image", "question" or "candidate_labels"} in each line"""
)
def learn(
    data: Annotated[
        str, typer.Argument(help="A folder of images, a JSONL file, or a built-in stream; no true answers needed.")
    ],
    budget: Annotated[
        str | None, typer.Option(help="Time to learn: 30s, 10m, 1h. Default: until all is used.")
    ] = None,
    question: Annotated[str, typer.Option(help="Asked where the data have no question.")] = "",
    labels: Annotated[str | None, typer.Option(help="Labels to choose from: a,b,c.")] = None,
    labels_file: Annotated[Path | None, typer.Option(help="The same, one on each line.")] = None,
    model: Annotated[str | None, typer.Option(help="`nano`, a folder or a hub id of a checkpoint.")] = None,
    home: HomeOption = None,
    adapter: LineOption = None,
    device: DeviceOption = None,
    learner: LearnerOption = None,
    seed: SeedOption = None,
    output: LineOutputOption = render.Output.json,
) -> None:
    """Learn from unlabeled data before serving, into the store that a server uses. Last line: JSON."""
    settings = {
        "model": model,
        "home": home,
        "adapter": adapter,
        "device": device,
        "learner": learner,
        "seed": seed,
    }
    flags = {name: value for name, value in settings.items() if value is not None}
    found = _labels(labels, labels_file)
    _last_line("learn", output, data, _seconds(budget), question, found, **flags)


def _seconds(budget: str | None) -> float | None:
    if budget is None:
        return None
    number, unit = budget[:-1], budget[-1:]
    if not (number.isdecimal() and int(number) and unit in ("s", "m", "h")):
        fail(f"--budget takes a time such as 30s, 10m or 1h, not {budget}", USAGE)
    return int(number) * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit]


def _labels(given: str | None, file: Path | None) -> list[str]:
    if given is not None and file is not None:
        fail("give --labels or --labels-file, not both", USAGE)
    if file is None:
        return [] if given is None else given.split(",")
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--labels-file cannot be read: {error}", USAGE)


@app.command()
def convert(
    name: Annotated[str, typer.Argument(help="A data set of the TTRV paper: imagenet-r, mathvista...")],
    folder: Annotated[Path, typer.Argument(help="A local copy in its public layout.")],
    out: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    num_options: Annotated[
        int | None, typer.Option("--options", min=2, max=26, help="Ask recognition by letter, among so many.")
    ] = None,
    output: OutputOption = render.Output.table,
) -> None:
    """Convert a public data set to JSONL for servetune eval."""
    datasets = _evals("datasets")
    try:
        count = datasets.convert(name, folder, out, num_options)
    except datasets.REFUSALS as error:
        fail(str(error), USAGE)
    if output is render.Output.json:
        render.show({"questions": count, "path": str(out)}, output)
    else:
        typer.echo(f"{count} questions: {out}")


def _count(samples: str) -> int:
    if not (samples.isdecimal() and int(samples) > 0):
        fail("--samples takes a number above 0, or all; for paper numbers with commas", USAGE)
    return int(samples)


def _choose(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        fail(f"{name} is one of {', '.join(str(each) for each in allowed if each)}, not {value}", USAGE)


def _evals(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"servetune.evals.{module}")
    except ModuleNotFoundError as error:
        _explain_missing(error)


def _last_line(name: str, output: render.Output, *given: Any, **flags: Any) -> None:
    """Run a command of the evaluation's folder and print what it returns: as JSON in a line, or for people."""
    module = _evals(name)
    try:
        summary = module.run(*given, **flags)
    except ValidationError as error:
        _explain_settings(error)
    except module.REFUSALS as error:
        fail(str(error), USAGE)
    if output is render.Output.json:
        typer.echo(json.dumps(summary))
    else:
        render.show(summary, output)


@app.command()
def doctor(
    model: ModelArgument = None,
    data: Annotated[
        str | None, typer.Option(help="Has learning anything to gain here? As for eval; labels are not read.")
    ] = None,
    device: DeviceOption = None,
    output: OutputOption = render.Output.table,
) -> None:
    """Check a model on this machine before going live. Exit code 1: it cannot serve or cannot learn."""
    examination = _evals("doctor")
    try:
        report = examination.run(model, data, device)
    except ValidationError as error:
        _explain_settings(error)
    except examination.MISUSE as error:
        fail(str(error), USAGE)
    except examination.REFUSALS as error:
        fail(str(error), REFUSED)
    render.show(report, output)
    if not report.can_learn:
        raise typer.Exit(REFUSED)


def _explain_settings(error: ValidationError) -> NoReturn:
    if error.title != "Settings":
        raise error
    wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    fail("; ".join(wrong), USAGE)


def _explain_missing(error: ModuleNotFoundError) -> NoReturn:
    missing = error.name or ""
    if missing.partition(".")[0] == "servetune":
        raise error
    fail(f'{missing} is not installed. Install the server: pip install "servetune[server]"', USAGE)


# --- questions ---------------------------------------------------------------------------------------


@command(
    app,
    epilog="""\b
Examples:
  servetune answer photo.png "What is this?"
  servetune answer photo.png "How many?" -n 8 --temperature 0.7       eight answers, and a vote
  servetune answer photo.png "What is this?" --adapt now              look again before answering
  servetune answer photo.png "What is this?" --no-adapt -o json       not to be learned from""",
)
def answer(
    client: Client,
    image: ImageArgument,
    question: Annotated[str, typer.Argument()],
    n: Annotated[int | None, typer.Option("--n", "-n", help="Answers to sample and vote over.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Above 0 for --n above 1.")] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option(help="Candidates to return.")] = None,
    seed: SeedOption = None,
    adapter: ChoiceOption = None,
    adapt: AdaptOption = Adapt.yes,
    no_adapt: NoAdaptOption = False,
    deadline: DeadlineOption = None,
) -> Answer:
    """Ask an open question about an image."""
    return client.answer(
        _image(image),
        question,
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        top_k=top_k,
        seed=seed,
        adapter=adapter,
        adapt=_consent(adapt, no_adapt),
        deadline_s=deadline,
    )


@command(
    app,
    epilog="""\b
Example:
  servetune recognize photo.png -l airplane -l rocket -l sailboat""",
)
def recognize(
    client: Client,
    image: ImageArgument,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", help="Give it at least twice; by default the adapter's labels."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="Instead of the default one.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Candidates to return.")] = None,
    adapter: ChoiceOption = None,
    adapt: AdaptOption = Adapt.yes,
    no_adapt: NoAdaptOption = False,
    deadline: DeadlineOption = None,
) -> Answer:
    """Choose one of the labels for an image."""
    return client.recognize(
        _image(image),
        labels or None,
        question=question,
        top_k=top_k,
        adapter=adapter,
        adapt=_consent(adapt, no_adapt),
        deadline_s=deadline,
    )


@command(app)
def feedback(
    client: Client,
    answer_id: Annotated[str, typer.Argument(help="`id` of an answer that you were given.")],
    correct: Annotated[bool | None, typer.Option("--correct/--wrong", help="Was it right?")] = None,
    right: Annotated[str | None, typer.Option("--answer", help="Or: what the right answer is.")] = None,
) -> Feedback:
    """Say whether an answer was right. It is counted by version, and not learned from."""
    return client.feedback(answer_id, correct, right=right)


def _consent(adapt: Adapt, no_adapt: bool) -> bool | Literal["now"]:
    if no_adapt or adapt is Adapt.no:
        return False
    return "now" if adapt is Adapt.now else True


def _image(source: str) -> str | bytes:
    return sys.stdin.buffer.read() if source == "-" else source


# --- adapters ----------------------------------------------------------------------------------------


@command(adapters, "list")
def list_adapters(client: Client) -> list[AdapterInfo]:
    """All adapters of the server."""
    return client.adapters.list()


@command(adapters)
def create(
    client: Client, name: Annotated[str, typer.Argument(help="Of a tenant, task or camera.")]
) -> AdapterInfo:
    """Make an adapter, which answers as the base until it learns."""
    return client.adapters.create(name)


@command(adapters)
def show(client: Client, name: Annotated[str, typer.Argument()] = "default") -> AdapterInfo:
    """Aliases, what is wanted and what is served."""
    return client.adapters.get(name)


@command(adapters)
def versions(client: Client, name: Annotated[str, typer.Argument()] = "default") -> list[VersionInfo]:
    """All versions."""
    return list(client.adapters.versions(name))


@command(adapters)
def settings(
    client: Client,
    mode: Annotated[Mode | None, typer.Option(help="off, observe, canary or live.")] = None,
    canary_share: Annotated[float | None, typer.Option(help="Of requests that the candidate answers.")] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="To choose from where a request names none.")
    ] = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Every request names its own.")] = False,
    name: NameOption = "default",
) -> AdapterSettings:
    """How an adapter behaves: show it, or change what is given."""
    if mode is None and canary_share is None and not labels and not no_labels:
        return client.adapters.settings(name)
    chosen = [] if no_labels else labels or None
    return client.adapters.configure(name, mode=mode, canary_share=canary_share, labels=chosen)


@command(adapters)
def snapshot(
    client: Client,
    label: Annotated[str, typer.Argument(help="Also the alias of the new version.")],
    metadata: Annotated[list[str] | None, typer.Option("--metadata", "-m", metavar="KEY=VALUE")] = None,
    name: NameOption = "default",
) -> VersionInfo:
    """Keep what is live as a version of its own."""
    pairs = [item.partition("=") for item in metadata or []]
    if not all(key and sign for key, sign, _ in pairs):
        raise ValueError("--metadata takes KEY=VALUE")
    return client.adapters.snapshot(label, {key: value for key, _, value in pairs}, name)


@command(adapters)
def promote(client: Client, version: VersionArgument, name: NameOption = "default") -> AdapterInfo:
    """Make a version live."""
    return client.adapters.promote(version, name)


@command(adapters)
def rollback(
    client: Client,
    to: Annotated[str | None, typer.Option(help="By default the last good version.")] = None,
    name: NameOption = "default",
) -> AdapterInfo:
    """Move live back to an existing version."""
    return client.adapters.rollback(to, name)


@command(adapters)
def reset(
    client: Client,
    to: Annotated[str, typer.Option(help="base unlearns everything.")] = "base",
    purge_buffer: Annotated[bool, typer.Option(help="Also delete the waiting queries.")] = False,
    name: NameOption = "default",
) -> VersionInfo:
    """Publish old weights as a new version and make it live."""
    return client.adapters.reset(to, purge_buffer, name)


@adapters.command()
def rebase(
    name: Annotated[str | None, typer.Argument(help="The adapter; by default the server's own.")] = None,
    model: Annotated[str | None, typer.Option(help="The new base: `nano`, a folder or a hub id.")] = None,
    home: HomeOption = None,
    device: DeviceOption = None,
    output: OutputOption = render.Output.table,
) -> None:
    """Begin an adapter again on another base model, with server and worker ended. Its versions stay listed."""
    options = {"model": model, "home": home, "device": device}
    flags = {key: value for key, value in options.items() if value is not None}
    try:
        render.show(importlib.import_module("servetune.server.main").rebase(name, **flags), output)
    except ModuleNotFoundError as error:
        _explain_missing(error)
    except ValidationError as error:
        _explain_settings(error)


@command(adapters)
def export(
    client: Client,
    version: VersionArgument,
    path: Annotated[Path, typer.Argument(help="A folder that is missing or empty.")],
    name: NameOption = "default",
) -> Path:
    """Download a version as a folder that PEFT and vLLM load."""
    return client.adapters.export(version, path, name)


@command(adapters)
def diff(
    client: Client,
    old: VersionArgument,
    new: Annotated[str, typer.Argument(help="Another, by default what is live.")] = "live",
    limit: Annotated[int, typer.Option(min=0, max=100, help="Changed answers to show.")] = 20,
    name: NameOption = "default",
) -> VersionDiff:
    """What two versions differ in: manifests, numbers, and the answers to queries kept for review."""
    return client.adapters.diff(old, new, name, limit=limit)


@command(adapters)
def review(
    client: Client,
    old: Annotated[str, typer.Argument(help="A version (v0007), an alias or base.")] = "base",
    new: Annotated[str, typer.Argument(help="Another, by default what is live.")] = "live",
    name: NameOption = "default",
) -> Review:
    """Is the one better than the other, by what was judged on the live page so far?"""
    return client.adapters.review(old, new, name)


@command(adapters, "import")
def import_adapter(
    client: Client,
    path: Annotated[Path, typer.Argument(help="A folder that PEFT or `export` made, or a tar of one.")],
    promote: Annotated[bool, typer.Option("--promote", help="Also make it live.")] = False,
    name: NameOption = "default",
) -> VersionInfo:
    """Publish an adapter from elsewhere as a version of its own."""
    return client.adapters.import_adapter(path, name, promote=promote)


@command(adapters)
def pin(client: Client, version: VersionArgument, name: NameOption = "default") -> VersionInfo:
    """Keep the weights of a version, whatever retention would do with them."""
    return client.adapters.pin(version, name)


@command(adapters)
def unpin(client: Client, version: VersionArgument, name: NameOption = "default") -> VersionInfo:
    """Leave the weights of a version to retention again."""
    return client.adapters.unpin(version, name)


@command(probes, "upload")
def upload_probes(
    client: Client,
    path: Annotated[Path, typer.Argument(help="JSONL: image, answer, and question or candidate_labels.")],
    name: NameOption = "default",
) -> ProbeSetInfo:
    """Give the gate a new set of labelled questions."""
    return client.adapters.upload_probes(path, name)


@command(probes, "list")
def list_probes(client: Client, name: NameOption = "default") -> list[ProbeSetInfo]:
    """The sets that are there; the gate judges by the newest."""
    return client.adapters.probe_sets(name)


@command(probes, "remove")
def remove_probes(
    client: Client,
    version: Annotated[str, typer.Argument(help="A set: p0001.")],
    name: NameOption = "default",
) -> list[ProbeSetInfo]:
    """Erase a set; the newest that is left counts."""
    return client.adapters.remove_probes(version, name)


# --- adaptation --------------------------------------------------------------------------------------


@command(app)
def status(client: Client, name: MeantOption = None) -> AdaptationStatus:
    """Is it learning, from what, and how far is serving behind?"""
    return client.adaptation.status(name)


@app.command()
def watch(
    name: MeantOption = None,
    output: OutputOption = render.Output.table,
    base_url: UrlOption = DEFAULT_BASE_URL,
    api_key: ApiKeyOption = None,
    admin_key: AdminKeyOption = None,
) -> None:
    """Watch an adapter learn until Ctrl-C: a live view, or a line for each event (-o json, or into a pipe)."""
    with explained(base_url), connect(base_url, api_key, admin_key) as client, suppress(KeyboardInterrupt):
        if output is render.Output.json or not sys.stdout.isatty():
            for event in client.adaptation.events(name):
                typer.echo(event.model_dump_json() if output is render.Output.json else watching.told(event))
            return
        view, before = watching.View(), client.adaptation.series(name)
        view.begin(before)
        with Live(view, refresh_per_second=4) as live:
            for event in client.adaptation.events(name, since=before.last_event_id, status=True):
                view.hear(event)
                live.refresh()


@app.command(
    epilog="""\b
Nothing is learned from it. Example:
  servetune bench photo.png -l cat -l dog --questions 500 --at-once 8"""
)
def bench(
    images: Annotated[
        list[str] | None, typer.Argument(help="Files or addresses, taken in turn; by default made-up pictures.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="By default: What is this?")] = None,
    labels: Annotated[list[str] | None, typer.Option("--label", "-l", help="Recognition, from twice on.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many to ask.")] = 100,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="How many wait at any time.")] = 4,
    output: OutputOption = render.Output.table,
    base_url: UrlOption = DEFAULT_BASE_URL,
    api_key: ApiKeyOption = None,
) -> None:
    """Measure a running server: answers a second, and how long they take."""
    if labels is not None and len(labels) < 2:
        fail("recognition chooses from two labels at least: give --label again", USAGE)

    async def measure(listen: Callable[[int], None]) -> benchmark.Figures:
        async with connect_async(base_url, api_key) as client:
            return await benchmark.measure(
                client, images or (), question, labels or (), questions, at_once, listen
            )

    with explained(base_url), render.progress("asking", questions) as listen:
        figures = asyncio.run(measure(listen))
    render.show(figures, output)


@command(app)
def pause(client: Client, name: MeantOption = None) -> AdaptationStatus:
    """Stop learning; answering goes on."""
    return client.adaptation.pause(name)


@command(app)
def resume(client: Client, name: MeantOption = None) -> AdaptationStatus:
    """Learn again."""
    return client.adaptation.resume(name)


@command(app)
def erase(
    client: Client,
    query_ids: Annotated[list[str], typer.Argument(help="`query_id` of answers.")],
    name: MeantOption = None,
) -> Erased:
    """Erase queries of an adapter wherever they are, with the versions that learned from them."""
    return client.adaptation.erase(query_ids, name)


@command(app)
def audit(
    client: Client, limit: Annotated[int, typer.Option(min=1, help="Entries to show.")] = 100
) -> list[AuditEntry]:
    """Who changed what."""
    return list(itertools.islice(client.adaptation.audit(), limit))
