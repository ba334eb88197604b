"""What the model does with queries that wait for it: they are answered together, whatever version they are for.

Their images are encoded, their prompts forwarded and their greedy answers grown as rows of one batch, where the
family allows it; each row has the adapter of its version. An answer is handed out as soon as it is there. While a
long one grows, what has come meanwhile is answered in between, so that a short question never waits for somebody's
essay.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch

from servetune.adapters import growth, search, tree
from servetune.adapters.answers import canonical
from servetune.adapters.calibration import tempered
from servetune.adapters.family import Prefix
from servetune.adapters.features import ByteCache
from servetune.adapters.growth import Sample, Stopped
from servetune.adapters.policy import Observation, Policy
from servetune.adapters.retention import Hold
from servetune.adapters.types import Query, Sampling

MOST_TOGETHER = 32  # queries in one batch
MEMORY = 0.9  # how much one more answer leaves of what was known of the pace
LET_OTHERS_IN = 8  # tokens of a growing answer after which what waits is answered


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer with its log-probability, and the likeliest in its place with theirs."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers that were asked for, as it was drawn; its tokens where they were asked for."""

    text: str
    finish_reason: str
    tokens: tuple[Token, ...] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The part of an answer that the model decides, with what it took."""

    text: str | None
    confidence: float | None
    candidates: list[tuple[str, float]]
    finish_reason: str  # stop, length, unparsed
    input_tokens: int
    output_tokens: int
    label_mass: float | None = None
    argmax_is_label: bool | None = None
    votes: dict[str, float] | None = None
    entropy: float | None = None
    choices: tuple[Choice, ...] = ()  # of an open question where several, or their tokens, were asked for
    inference_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Resident:
    """A version whose weights are loaded: where they are (None: the base), what they are, and its temperature.

    Its `hold` keeps retention from them.
    """

    adapter: str
    version: int
    slot: str | None
    digest: str
    temperature: float = 1.0
    hold: Hold | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from the others."""
        return self.adapter, self.version


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A query, the version that answers it, and who waits for the answer.

    `listen` is told the text so far of a single answer that grows, on the policy's thread.
    """

    query: Query
    sampling: Sampling
    version: Resident
    stop: threading.Event
    found: Future[Found]
    listen: Callable[[str], None] | None = None


class Answering:
    """The queries that wait for a policy. `add` may be called from any thread, `turn` from the policy's alone.

    Args:
        cache_bytes: of keys and values of prompts, kept for the same question to the same version.
    """

    def __init__(self, policy: Policy, cache_bytes: int = 0) -> None:
        self._policy = policy
        self._prompts = ByteCache(cache_bytes)
        self.pace_s = 0.0  # of the model's time for an answer, of late
        self.batches: Counter[int] = Counter()  # how often so many were answered together
        self._pending: deque[Job] = deque()
        self._nested = False
        self._num_taken = 0

    def add(self, job: Job) -> None:
        """Let a job wait; whoever adds one sees to it that `turn` is called."""
        self._pending.append(job)

    def forget_prompts(self) -> None:
        """Keep nothing of the prompts so far. On the policy's thread."""
        self._prompts.clear()

    def cancel(self) -> None:
        """Nothing that waits will be answered."""
        while self._pending:
            self._pending.popleft().found.cancel()

    @torch.no_grad()
    def turn(self) -> None:
        """Answer the job that has waited longest, and others with it."""
        taken = self._num_taken
        if not (jobs := self._take()):
            return
        began = time.perf_counter()
        try:
            self._policy.use(jobs[0].version.slot)  # of all, where versions cannot be mixed
            self._answer(jobs, began)
        except Exception as error:
            for job in jobs:
                if not job.found.done():
                    job.found.set_exception(error)
        if not self._nested:  # what was let in is part of this turn
            self._note(time.perf_counter() - began, self._num_taken - taken)

    def _note(self, spent_s: float, num: int) -> None:
        kept = MEMORY**num if self.pace_s else 0.0
        self.pace_s = kept * self.pace_s + (1 - kept) * spent_s / num

    def _take(self) -> list[Job]:
        jobs: list[Job] = []
        others: list[Job] = []
        while self._pending and len(jobs) < MOST_TOGETHER:
            job = self._pending.popleft()
            if jobs and not self._policy.mixes and job.version.slot != jobs[0].version.slot:
                others.append(job)
            elif job.found.set_running_or_notify_cancel():
                if job.stop.is_set():
                    job.found.set_exception(Stopped())
                else:
                    jobs.append(job)
        self._pending.extendleft(reversed(others))
        self._num_taken += len(jobs)
        if jobs:
            self.batches[len(jobs)] += 1
        return jobs

    def _answer(self, jobs: list[Job], began: float) -> None:
        seen = self._observe(jobs)
        greedy = [job for job in seen if not job.query.labels and _is_greedy(job.sampling)]
        choices = [job for job in seen if job.query.labels]
        for job in seen:
            if job not in greedy and job not in choices:
                self._answer_alone(job, seen[job], began)
        if choices:
            self._choose(choices, [seen[job] for job in choices], began)
        if greedy:
            self._speak(greedy, [seen[job] for job in greedy], began)

    def _observe(self, jobs: list[Job]) -> dict[Job, Observation]:
        """What the model sees of each; one that cannot be taken has its error, and the others go on."""
        try:
            return dict(zip(jobs, self._policy.observe_each([job.query for job in jobs]), strict=True))
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].found.set_exception(error)
                return {}
        return {job: one for each in jobs for job, one in self._observe([each]).items()}

    def _begin(self, jobs: Sequence[Job], seen: Sequence[Observation]) -> tree.Prefixes:
        versions, slots = [job.version.digest for job in jobs], tuple(job.version.slot for job in jobs)
        return self._policy.begin_each(seen, versions, self._prompts, slots if self._policy.mixes else None)

    # --- labels --------------------------------------------------------------------------------------

    def _choose(self, jobs: list[Job], seen: Sequence[Observation], began: float) -> None:
        family = self._policy.family
        for rows, prefix in self._begin(jobs, seen):
            labels = [jobs[row].query.labels for row in rows]
            tokens = [[family.tokens(label) for label in own] for own in labels]
            scored = search.search_each(family, prefix, tokens)
            for place, (row, logprobs) in enumerate(zip(rows, scored, strict=True)):
                job = jobs[row]
                shares = (logprobs / job.version.temperature).softmax(-1)
                best = shares.topk(min(job.sampling.top_k, len(shares)))
                ranked = [
                    (job.query.labels[index], share)
                    for index, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ]
                job.found.set_result(
                    Found(
                        text=ranked[0][0],
                        confidence=ranked[0][1],
                        candidates=ranked,
                        finish_reason="stop",
                        input_tokens=prefix.lengths[place],
                        output_tokens=len(family.tokens(ranked[0][0])),
                        label_mass=min(1.0, float(logprobs.exp().sum())),
                        argmax_is_label=int(prefix.logits[place].argmax()) in {own[0] for own in tokens[place]},
                        entropy=entropy(shares.tolist()),
                        inference_s=time.perf_counter() - began,
                    )
                )

    # --- open questions ------------------------------------------------------------------------------

    def _speak(self, jobs: list[Job], seen: Sequence[Observation], began: float) -> None:
        """The greedy answers, each handed out when it ends."""

        def hand_out(row: int, samples: list[Sample]) -> None:
            job = jobs[row]
            spoken = self._spoken(samples[0], [], job, seen[row].prompt.length)
            job.found.set_result(_timed(spoken, began))

        watch = _Watch(self, jobs, hand_out)
        limits = [job.sampling.max_tokens for job in jobs]
        growth.sample_each(self._begin(jobs, seen), 1, limits, temperature=0.0, watch=watch)
        for job in jobs:
            if not job.found.done():
                job.found.set_exception(Stopped())

    def _answer_alone(self, job: Job, seen: Observation, began: float) -> None:
        try:
            [(_, prefix)] = self._begin([job], [seen])
            found = self._vote(prefix, job) if job.sampling.n > 1 else self._say(prefix, job)
            job.found.set_result(_timed(found, began))
        except Exception as error:
            job.found.set_exception(error)

    def _say(self, prefix: Prefix, job: Job) -> Found:
        family, sampling = self._policy.family, job.sampling
        generator = _generator(sampling.seed)
        chosen = growth.sample(
            family, prefix, 1, sampling.max_tokens, sampling.temperature, generator, job.stop, self.listener(job)
        )[0]
        others = []
        if sampling.top_k > 1:
            others = growth.alternatives(family, prefix, sampling.top_k, sampling.max_tokens, job.stop)
        spoken = self._spoken(chosen, others, job, prefix.width)
        return replace(spoken, choices=self._choices(prefix, [chosen], sampling))

    def listener(self, job: Job) -> Callable[[tuple[int, ...]], None] | None:
        """What passes on the text of tokens to who listens."""
        if (listen := job.listen) is None:
            return None
        return lambda tokens: listen(self._policy.family.text(tokens))

    def _choices(self, prefix: Prefix, samples: Sequence[Sample], sampling: Sampling) -> tuple[Choice, ...]:
        """Every answer that was drawn, in any order, with its tokens where the sampling asks for them."""
        choices: list[Choice] = []
        for one in samples:
            text = self._policy.family.text(one.tokens)
            tokens = None if sampling.logprobs is None else self._tokens(prefix, one, sampling.logprobs)
            choices += [Choice(text, "stop" if one.finished else "length", tokens)] * one.count
        return tuple(choices)

    def _tokens(self, prefix: Prefix, sample: Sample, top: int) -> tuple[Token, ...]:
        """The tokens of an answer but the one that ends it."""
        family = self._policy.family
        own, best, which = tree.likelihoods(family, prefix, sample.tokens, top)
        spelt = family.tokenizer.decode
        rows = zip(sample.tokens, own.tolist(), best.tolist(), which.tolist(), strict=True)
        found = [
            Token(spelt([token]), logprob, tuple((spelt([i]), p) for p, i in zip(values, ids, strict=True)))
            for token, logprob, values, ids in rows
        ]
        return tuple(found[:-1] if sample.finished else found)

    def _spoken(self, chosen: Sample, others: Sequence[Sample], job: Job, input_tokens: int) -> Found:
        family = self._policy.family
        scores = {family.text(chosen.tokens): tempered(math.exp(chosen.logprob), job.version.temperature)}
        for other in others:
            scores.setdefault(
                family.text(other.tokens), tempered(math.exp(other.logprob), job.version.temperature)
            )
        text = family.text(chosen.tokens)
        ranked = sorted(((t, p) for t, p in scores.items() if t), key=lambda pair: -pair[1])
        return Found(
            text=text or None,
            confidence=scores[text] if text else None,
            candidates=ranked[: job.sampling.top_k],
            finish_reason=_finish(text, chosen.finished),
            input_tokens=input_tokens,
            output_tokens=len(chosen.tokens),
        )

    def _vote(self, prefix: Prefix, job: Job) -> Found:
        family, sampling = self._policy.family, job.sampling
        samples = growth.sample(
            family,
            prefix,
            sampling.n,
            sampling.max_tokens,
            sampling.temperature,
            _generator(sampling.seed),
            job.stop,
        )
        shares: dict[str, float] = defaultdict(float)
        spoken: dict[str, tuple[str, bool]] = {}
        for one in sorted(samples, key=lambda s: -s.count):
            text = family.text(one.tokens)
            answer = canonical(text)
            shares[answer] += one.count / sampling.n
            spoken.setdefault(answer, (text, one.finished))
        votes = {spoken[answer][0]: share for answer, share in shares.items() if answer}
        ranked = sorted(votes.items(), key=lambda pair: -pair[1])
        text, share = ranked[0] if ranked else ("", 0.0)
        return Found(
            text=text or None,
            confidence=share if text else None,
            candidates=ranked[: sampling.top_k] if sampling.top_k > 1 else ranked,
            finish_reason=_finish(text, spoken.get(canonical(text), ("", True))[1]),
            input_tokens=prefix.width,
            output_tokens=sum(len(one.tokens) * one.count for one in samples),
            votes=votes,
            entropy=entropy(list(shares.values())),
            choices=self._choices(prefix, samples, sampling),
        )

    # --- those who come meanwhile ----------------------------------------------------------------------

    def let_in(self, slot: str | None) -> None:
        """Answer what waits, then go on with a slot; not while others have been let in already."""
        if self._nested or not self._pending:
            return
        self._nested = True
        try:
            self.turn()
        finally:
            self._nested = False
            self._policy.use(slot)


class _Watch(growth.Watch):
    """Hands out what is finished, drops what nobody waits for, and lets others in."""

    def __init__(
        self, answering: Answering, jobs: list[Job], hand_out: Callable[[int, list[Sample]], None]
    ) -> None:
        self._answering = answering
        self._jobs = jobs
        self._hand_out = hand_out

    def finished(self, row: int, samples: list[Sample]) -> None:
        self._hand_out(row, samples)

    def grew(self, row: int, tokens: tuple[int, ...]) -> None:
        if listen := self._answering.listener(self._jobs[row]):
            listen(tokens)

    def stopped(self, row: int) -> bool:
        return self._jobs[row].stop.is_set()

    def stepped(self, depth: int) -> None:
        if (depth + 1) % LET_OTHERS_IN == 0:
            self._answering.let_in(self._jobs[0].version.slot)


def _is_greedy(sampling: Sampling) -> bool:
    alone = sampling.top_k > 1 or sampling.logprobs is not None
    return sampling.n == 1 and sampling.temperature == 0 and not alone


def _timed(found: Found, began: float) -> Found:
    return replace(found, inference_s=time.perf_counter() - began)


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)


def _finish(text: str, finished: bool) -> str:
    if not text:
        return "unparsed"
    return "stop" if finished else "length"


def entropy(shares: list[float]) -> float:
    """Of some probabilities, in nats."""
    return -sum(p * math.log(p) for p in shares if p > 0)
