"""`servetune doctor`: does this model serve and learn on this machine, and has learning anything to gain?

Whatever can be tried is tried, through the code that serves: prompts are rendered, probes answered, and a learning
step is made on an adapter that is thrown away. What the findings mean is in `diagnosis`.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2
import torch
import transformers
from PIL import Image, ImageDraw
from rich.console import Console
from transformers.utils import cached_file

from servetune.adapters import growth
from servetune.adapters.ballots import Lesson
from servetune.adapters.family import Family, UnsupportedModel
from servetune.adapters.policy import Policy
from servetune.adapters.rollouts import roll_out
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.types import Query
from servetune.adapters.views import SAME, safe_views
from servetune.evals import streams
from servetune.evals.data import BadData, read_unlabeled
from servetune.evals.diagnosis import SENTENCES, diagnose, judge
from servetune.evals.findings import (
    AdapterFacts,
    AnswerFacts,
    DataFacts,
    MachineFacts,
    MemoryFacts,
    ModelFacts,
    Report,
    SpeedFacts,
    TemplateFacts,
)
from servetune.server.model import load_policy
from servetune.server.settings import Settings
from servetune.server.valkey import ValkeyError, find_binary
from servetune.server.worker import learner_config


class NoDevice(ValueError):
    """The device that was asked for is not there."""


MISUSE = (BadData, NoDevice)
REFUSALS = (UnsupportedModel,)
SLOT = "candidate"
ROLLOUTS = 8  # of each probe
QUERIES = 64  # of the operator's data
CHUNK = 4
STEP_S = 120.0  # a step that would take longer is made on fewer queries
MEGA = 1e6
COLORS = ("red", "blue", "green")
SHAPES = ("circle", "square", "triangle")
YES_OR_NO = "Is there a circle in the image? Answer yes or no."
COLOR = "What color is the shape?"
LETTER = "What color is the shape?\nA. red\nB. blue\nC. green\nAnswer with the option's letter only."
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
LOCAL: dict[str, Any] = {
    "local_files_only": True,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
PROJECTOR = re.compile(r"projector|connector|merger|projection\.proj|mlp1")

Say = Callable[[str], None]


def run(model: str | None, data: str | None, device: str | None) -> Report:
    """Examine, with the stage on stderr. Raises as `examine` does."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    flags: dict[str, Any] = {"model": model, "device": device}
    settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    with Console(stderr=True).status("loading") as status:
        return examine(settings, data, status.update)


def examine(settings: Settings, data: str | None, say: Say = lambda stage: None) -> Report:
    """Load the model of the settings and find out everything about it. Nothing is kept.

    Args:
        data: as `servetune eval` takes it; answers and labels of images are not needed and not read.

    Raises:
        BadData: the data cannot be used.
        NoDevice: there is no CUDA for the device of the settings.
        UnsupportedModel: see `Family.load`.
    """
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise NoDevice(f"there is no {settings.device} here: take --device cpu, or a torch built for this GPU")
    queries = _read_queries(data) if data else []  # before the model is loaded
    free = _free_mb(settings)
    began = time.perf_counter()
    policy = load_policy(settings, (SLOT,), settings.serve_threads)
    load_s = time.perf_counter() - began
    say("rendering prompts")
    template = check_template(policy.family)
    say("answering probes")
    answers = sample_answers(policy, settings)
    answer_s, cache_mb, token_mb = _time_answers(policy, settings)
    say("making a learning step")
    step_s, step_mb, step_queries, estimated = _try_step(policy, settings, answer_s)
    weights_mb = _megabytes(_base_parameters(policy))
    longest = policy.family.max_length
    processes = 2 if settings.worker else 1
    report = Report(
        model=_model_facts(policy),
        template=template,
        answers=answers,
        adapter=_adapter_facts(policy),
        memory=MemoryFacts(
            weights_mb=weights_mb,
            cache_mb=cache_mb,
            longest_cache_mb=token_mb * longest if longest < 2**31 else None,
            step_mb=step_mb,
            estimated=estimated,
            needed_mb=processes * weights_mb + cache_mb + (step_mb if settings.worker else 0.0),
            free_mb=free,
        ),
        machine=_machine_facts(policy, settings),
        speed=SpeedFacts(
            load_s=load_s, answer_s=answer_s, step_s=step_s, step_queries=step_queries, estimated=estimated
        ),
        data=_weigh_data(policy, settings, Path(data).name, queries, say) if data else None,
        problems=[],
    )
    return report.model_copy(update={"problems": list(diagnose(report, settings))})


# --- model and template ------------------------------------------------------------------------------


def _model_facts(policy: Policy) -> ModelFacts:
    model = policy.family.model
    return ModelFacts(
        source=policy.family.source,
        family=model.config.model_type,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in _base_parameters(policy)),
        positions=policy.family.max_length,
        base_digest=policy.base_digest,
    )


def _base_parameters(policy: Policy) -> list[torch.Tensor]:
    return [value for name, value in policy.family.model.named_parameters() if ".lora_" not in name]


def check_template(family: Family) -> TemplateFacts:
    """Render one question about one image in every way there is, and compare."""
    image, question = draw(SHAPES[0], COLORS[0]), "What is this?"
    asked = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    replied = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    tokens = family.prompt([image], question).inputs["input_ids"][0].tolist()
    question_alone, due, whole = (
        str(family.tokenizer.apply_chat_template(turns, chat_template=family.template, tokenize=False, **options))
        for turns, options in (
            ([asked], {"add_generation_prompt": False}),
            ([asked], {"add_generation_prompt": True}),
            ([asked, replied], {}),
        )
    )
    opening = due.removeprefix(question_alone).strip()
    after = family.tokenizer(whole.rpartition("yes")[2], add_special_tokens=False)["input_ids"]
    return TemplateFacts(
        file=_template_file(family),
        native=_renders_alike(family, asked, tokens),
        replies=due != question_alone and str(family.tokenizer.decode(tokens)).rstrip().endswith(opening),
        stops=bool(after) and after[0] in family.end_tokens,
    )


def _renders_alike(family: Family, turn: dict[str, Any], tokens: list[int]) -> bool | None:
    """Whether the processor's own method gives these tokens; None where a part of it is missing."""
    try:
        made = family.processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, jinja2.TemplateError):
        return None
    return bool(made["input_ids"][0].tolist() == tokens)


def _template_file(family: Family) -> str | None:
    """The file of the checkpoint that holds the template in use."""
    for name in TEMPLATE_FILES:
        found = cached_file(family.source, name, **LOCAL)
        if found is None:
            continue
        text = Path(found).read_text()
        held = json.loads(text).get("chat_template") if name.endswith(".json") else text
        if held == family.template:
            return name
    return None


# --- probes ------------------------------------------------------------------------------------------


def draw(shape: str, color: str) -> Image.Image:
    """One coloured shape on white."""
    image = Image.new("RGB", (224, 224), "white")
    brush = ImageDraw.Draw(image)
    if shape == "circle":
        brush.ellipse((52, 52, 172, 172), fill=color)
    elif shape == "square":
        brush.rectangle((52, 52, 172, 172), fill=color)
    else:
        brush.polygon([(112, 52), (172, 172), (52, 172)], fill=color)
    return image


def _probes(question: str) -> list[Query]:
    return [
        Query(f"{shape} {question[:8]}", (draw(shape, color),), question)
        for shape, color in zip(SHAPES, COLORS, strict=True)
    ]


def sample_answers(policy: Policy, settings: Settings) -> AnswerFacts:
    """Rollouts of the base on the probes, counted as the learner counts them."""
    generator = torch.Generator().manual_seed(settings.seed)
    fits = {YES_OR_NO: {"yes", "no"}, COLOR: None, LETTER: {"a", "b", "c"}}
    shares: dict[str, list[float]] = {question: [] for question in fits}
    written: Counter[str] = Counter()
    valid = []
    with policy.reference():
        for question, wanted in fits.items():
            for probe in _probes(question):
                group = roll_out(policy, probe, ROLLOUTS, settings.max_answer_tokens, generator)
                valid.append(group.votes.valid)
                shares[question].append(sum(p for a, p in group.votes.by_answer.items() if a in (wanted or {a})))
                for tokens, weight in zip(group.rollouts.tokens, group.rollouts.weights.tolist(), strict=True):
                    written[" ".join(policy.family.text(tokens).split())[:40]] += round(weight * ROLLOUTS)
    return AnswerFacts(
        rollouts=ROLLOUTS * len(valid),
        valid=fmean(valid),
        yes_or_no=fmean(shares[YES_OR_NO]),
        letter=fmean(shares[LETTER]),
        examples=[text for text, _ in written.most_common(5)],
    )


@torch.no_grad()
def _time_answers(policy: Policy, settings: Settings) -> tuple[float, float, float]:
    """Median seconds of an answer, megabytes of its cache at the token limit, and of one token in it."""
    family, seconds = policy.family, []
    with policy.reference():
        for probe in _probes(COLOR):
            began = time.perf_counter()
            prefix = policy.begin(policy.observe(probe))
            growth.sample(family, prefix, 1, settings.max_answer_tokens, temperature=0.0)
            seconds.append(time.perf_counter() - began)
    token_mb = _megabytes(prefix.tensors()[1:]) / prefix.width
    return median(seconds), token_mb * (prefix.width + settings.max_answer_tokens), token_mb


# --- adapter and machine -----------------------------------------------------------------------------


def _adapter_facts(policy: Policy) -> AdapterFacts:
    family, parameters = policy.family, policy.parameters(SLOT)
    names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in parameters}
    language = {name for name in names if name.startswith(f"{family.decoder_name}.")}
    projector = {name for name in names - language if PROJECTOR.search(name)}
    own = sum(parameter.numel() for parameter in parameters.values())
    return AdapterFacts(
        part=policy.spec.part,
        rank=policy.spec.rank,
        modules=len(names),
        language=len(language),
        projector=len(projector),
        vision=len(names - language - projector),
        parameters=own,
        share=own / sum(parameter.numel() for parameter in _base_parameters(policy)),
    )


def _machine_facts(policy: Policy, settings: Settings) -> MachineFacts:
    return MachineFacts(
        device=str(policy.family.device),
        dtype=str(policy.family.model.dtype).removeprefix("torch."),
        cores=os.cpu_count() or 1,
        serve_threads=settings.serve_threads,
        worker_threads=settings.worker_threads,
        redis=_redis(settings),
        idle_gpu=policy.family.device.type == "cpu" and torch.cuda.is_available(),
    )


def _redis(settings: Settings) -> str | None:
    if settings.redis_url:
        return "your own, not contacted"
    try:
        return f"embedded: {find_binary().name}"
    except ValkeyError:
        return None


def _megabytes(tensors: Iterable[torch.Tensor]) -> float:
    return float(sum(tensor.nbytes for tensor in tensors)) / MEGA


def _free_mb(settings: Settings) -> float | None:
    """Memory that is free on the device; None where the system does not tell."""
    if settings.device.startswith("cuda") or (settings.device == "auto" and torch.cuda.is_available()):
        return float(torch.cuda.mem_get_info()[0] / MEGA)
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 / MEGA if found else None


class _Peak:
    """Growth of the memory peak since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.exact = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) / MEGA
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
            self._before = _resident_mb("VmRSS")
        except OSError:
            self.exact = False
            self._before = _resident_mb("VmHWM")

    def growth_mb(self) -> float:
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device) / MEGA - self._before)
        return max(0.0, _resident_mb("VmHWM") - self._before)


def _resident_mb(name: str) -> float:
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    kilobytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024 / MEGA


def _try_step(policy: Policy, settings: Settings, answer_s: float) -> tuple[float, float, int, bool]:
    """One step of the configured learner on probes, on a fresh adapter.

    Half of the probes are open and half are a choice for which a wrong answer is demanded, so that there is
    something to learn. Where a whole batch would take too long, fewer queries are asked and the figures scaled up.

    Returns:
        seconds and megabytes for a batch, its size, and whether that is an estimate.
    """
    batch = settings.queries_per_step
    each_s = 2 * answer_s * len(safe_views(COLOR))
    count = max(1, min(batch, int(STEP_S / each_s)))
    config = replace(learner_config(settings), min_valid=0.0, min_information=-math.inf, agreement=(0.0, 1.0))
    queries = []
    for number in range(count):
        probe = _probes(COLOR)[number % len(SHAPES)]
        queries.append(replace(probe, id=f"probe {number}", labels=() if number % 2 else COLORS))
    torch.set_num_threads(settings.worker_threads)
    learner = Learner(policy, config, SLOT)
    learner.truths = {query.id: COLORS[(n + 1) % len(COLORS)] for n, query in enumerate(queries) if query.labels}
    peak, began = _Peak(policy.family.device), time.perf_counter()
    learner.step(queries)
    seconds, megabytes = time.perf_counter() - began, peak.growth_mb()
    torch.set_num_threads(settings.serve_threads)
    policy.load(SLOT, policy.zero_weights())
    scale = batch / count
    return seconds * scale, megabytes * scale, batch, scale != 1 or not peak.exact or not learner.steps


# --- the operator's data -----------------------------------------------------------------------------


def _read_queries(name: str) -> list[Query]:
    data = streams.load(name) if name in streams.STREAMS else read_unlabeled(Path(name))
    chosen = random.Random(0).sample(data.items, min(QUERIES, len(data.items)))
    return [item.query("") for item in chosen]


def _weigh_data(policy: Policy, settings: Settings, name: str, queries: list[Query], say: Say) -> DataFacts:
    """Let the default learner vote on the queries, and never make a step."""
    question = settings.recognition_question or policy.family.recognition_question
    queries = [replace(query, question=query.question or question) for query in queries]
    config = LearnerConfig(num_rollouts=settings.num_rollouts, max_tokens=settings.max_answer_tokens)
    learner = Learner(policy, replace(config, update_budget=0, min_valid=0.0), SLOT, settings.seed)
    learner.memory.max_bytes = 2**62  # what takes room is dropped below: nothing is learned here
    for start in range(0, len(queries), CHUNK):
        say(f"voting on {name}: {start} of {len(queries)}")
        learner.step(queries[start : start + CHUNK])
        for lesson in learner.memory.lessons():
            lesson.ballot.observations = {}
    ballots = [lesson.ballot for lesson in learner.memory.lessons()]
    learner.forget([ballot.query.id for ballot in ballots if ballot.valid < config.min_valid])
    lessons = learner.memory.lessons()
    figures = {
        "valid": sum(ballot.valid for ballot in ballots) / len(queries),
        "divergence": _mean(lesson.divergence for lesson in lessons),
        "changed": _mean(map(_votes_otherwise, lessons)),
    }
    information, worth = learner.memory.dependence(), learner.memory.worth()
    clearer = worth.tells_more if any(not lesson.ballot.query.labels for lesson in lessons) else None
    only_open = clearer is not None and all(not lesson.ballot.query.labels for lesson in lessons)
    outlook = judge(len(lessons), information=information, clearer=clearer if only_open else None, **figures)
    return DataFacts(
        name=name,
        asked=len(queries),
        entropy=_mean(map(_entropy, lessons)),
        information=information,
        clearer=clearer,
        outlook=outlook,
        verdict=SENTENCES[outlook].format(**figures),
        **figures,
    )


def _mean(values: Iterable[float]) -> float:
    """0 where there are none."""
    found = list(values)
    return fmean(found) if found else 0.0


def _votes_otherwise(lesson: Lesson) -> bool:
    return int(lesson.target.argmax()) != int(lesson.ballot.scores[SAME].argmax())


def _entropy(lesson: Lesson) -> float:
    logprobs = lesson.ballot.scores[SAME]
    return -float((logprobs.exp() * logprobs.clamp(min=-100.0)).sum())
