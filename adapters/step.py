"""One update: queries in, rollouts, votes, advantages, one clipped gradient step on the LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from servetune.adapters import tree
from servetune.adapters.ballots import Ballot, Lesson, has_few_answers
from servetune.adapters.consensus import view_weights
from servetune.adapters.family import Prefix
from servetune.adapters.grpo import advantages, kl_penalty, policy_loss
from servetune.adapters.memory import Memory
from servetune.adapters.policy import Observation, Policy, Tokens, scaled
from servetune.adapters.rewards import REWARDS, Votes, confidence_weight
from servetune.adapters.rollouts import Group, cast_ballot, roll_out, vote_again
from servetune.adapters.types import Query, StepMetrics
from servetune.adapters.views import SAME, safe_views
from servetune.adapters.worth import MEASURED

WITNESS_EVERY = 8  # every so many queries one is never learned from
NUM_WITNESSES = 64  # as many of them are asked
MEASURE_EVERY = 4  # every so many queries all views are tried, to know what each is worth
REPLAYED = 0.5  # share of the update budget that is spent as queries come; the rest when nothing waits
FINISHED = 0.02  # mean nats between votes and answers below which there is nothing to learn
REVOTED = 16  # queries that are voted on again in one go
MAX_TAUGHT = 12  # answers of one query that take part in a step


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    """How to learn. `reward` is `consensus`, the default, one of `rewards.REWARDS`, or `random`, the control.

    `consensus` votes over views, neighbours and the stream (`memory`): `num_views` looks at each query,
    `batch_size` queries in a gradient step, each query in `update_budget` steps at most, replayed from the last
    `memory_size`. When nothing waits, what has been learned votes as well, in `rounds` - 1 further rounds of half
    the budget. Nothing is learned from answers with less than `min_information` nats about the images. What is
    published is a moving average of the weights, of decay `average` per step, and of what it changes in the base
    a share (weight-space ensemble, arXiv 2109.01903): what fits this stream alone goes first. It is the one
    of `shares` that witnesses like best, `share` until there are any, and no more than that among few answers.
    The other rewards are those of one group of rollouts.

    `agreement` is the band of the majority's share in which a group teaches anything: below it the query is
    hopeless, above it finished. `exact` uses the whole distribution over a closed set of labels instead of
    drawing from it; `scale` divides advantages by their standard deviation; `confidence` weighs a group by
    how little it is torn; `per_token` averages over an answer's tokens instead of summing them.

    `max_bytes` is what the activations of one backward pass may take, about; more is done in several.
    """

    reward: str = "consensus"
    num_rollouts: int = 32
    max_tokens: int = 32
    learning_rate: float = 1e-3
    kl_coefficient: float = 0.04
    clip: float = 0.2
    max_grad_norm: float = 1.0
    min_valid: float = 0.5
    agreement: tuple[float, float] = (0.1, 0.98)
    exact: bool = True
    scale: bool = False
    confidence: bool = True
    per_token: bool = False
    num_views: int = 8
    batch_size: int = 16
    update_budget: int = 6
    rounds: int = 3
    memory_size: int = 1024
    min_information: float = 0.1
    max_bytes: int = 2 * 2**30
    average: float = 0.9
    share: float = 0.7
    shares: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0)

    @classmethod
    def named(cls, learner: str, **chosen: Any) -> LearnerConfig:
        """The default learner, `frequency` (exact votes of single groups), or the published form under a reward.

        The published form draws labels, divides by the standard deviation, averages over tokens, weighs all
        groups alike and learns from every group with a signal (arXiv 2510.06783; `released`: the authors' code).
        """
        if learner == "default":
            return cls(**chosen)
        chosen = {"share": 1.0, "shares": (1.0,), **chosen}
        if learner == "frequency":
            return cls(reward=learner, **chosen)
        if learner in ("entropy", "self-training"):  # baselines of the evaluation
            sure = (0.9, 1.0) if learner == "self-training" else (0.0, 1.0)
            return cls(reward=learner, confidence=False, agreement=sure, **chosen)
        if learner == "released":
            chosen = {**chosen, "kl_coefficient": 0.001}
        published = cls(
            reward=learner, exact=False, scale=True, confidence=False, per_token=True, agreement=(0.0, 1.0)
        )
        return replace(published, **chosen)


@dataclass(frozen=True, slots=True)
class _Exercise:
    """One lesson as it takes part in a step."""

    lesson: Lesson
    observation: Observation
    reference: Tensor  # (A,) log-probabilities of the answers, among them
    answers: list[int]  # A numbers of the ballot's answers

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        return self.lesson.ballot.tokens


@dataclass(frozen=True, slots=True)
class _Standing:
    """How the adapter stood to one lesson, or group, when a step was taken on it.

    `reward` is what its answer can expect; `agrees` whether its likeliest answer was the one voted for, known only
    where it had not been learned from before.
    """

    divergence: float  # KL to the reference
    reward: float
    agrees: bool | None = None


class Learner:
    """Owns the optimizer of one slot of a policy, and the memory of what it was lately asked."""

    def __init__(self, policy: Policy, config: LearnerConfig, slot: str = "candidate", seed: int = 0) -> None:
        self.policy = policy
        self.config = config
        self.slot = slot
        self.steps = 0
        self.memory = Memory(config.memory_size)
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters = policy.parameters(slot)
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=config.learning_rate, weight_decay=0.0)
        self.truths: Mapping[str, str] = {}  # answers by query id, for the `oracle` of an evaluation alone
        self._max_tokens = config.max_bytes // policy.family.token_bytes
        self.share = config.share  # of what the weights change in the base that is published
        self._average = policy.weights(slot)
        self._ahead: dict[str, Tensor] | None = None  # where the steps have got to while the average is judged
        self._asked = 0
        self._revoted: list[Ballot] = []  # with a say of the candidate
        self._unfinished = False

    @property
    def unfinished(self) -> bool:
        """Whether remembered queries may still take part in steps."""
        return self._unfinished

    def step(self, queries: Sequence[Query]) -> tuple[StepMetrics, list[Query]]:
        """Learn from a batch; from what is remembered when it is empty.

        Returns:
            the metrics and the queries of the batch that count as learned from: those with a signal, or, in the
            default learner, all that vote. Without a signal the weights are untouched.
        """
        self.policy.use(self.slot)
        if self.config.reward == "consensus":
            return self._replay(queries)
        return self._learn_from_groups(queries)

    def witnesses(self) -> list[Lesson]:
        """The reference's votes on recent queries that were never learned from: they are news to the adapter."""
        lessons = self.memory.lessons(later_rounds=False)
        return [lesson for lesson in lessons if lesson.ballot.witness][-NUM_WITNESSES:]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the weights and of the optimizer's state, both by flat names."""
        moments = {}
        for key, parameter in self._parameters.items():
            for name, value in self._optimizer.state.get(parameter, {}).items():
                moments[f"{name}:{key}"] = value.detach().clone()
        return self.policy.weights(self.slot), moments

    def propose(self) -> None:
        """Put what would be published into the slot, as the candidate; `proceed` takes it back."""
        if self._ahead is None:
            self._ahead = self.policy.weights(self.slot)
        self.policy.load(self.slot, scaled(self._average, self.share))

    def choose_share(self, witnesses: Sequence[Lesson], nearness: Callable[[], float]) -> None:
        """Propose the share that witnesses like best, the present one or one of its neighbours.

        Where few answers are possible they do not see what a larger share does to those that their stream does not
        show, so that it stays at most what it is by default.

        Args:
            nearness: how near the slot comes to the witnesses' votes.
        """
        few = any(has_few_answers(witness.ballot.query) for witness in witnesses)
        allowed = [share for share in self.config.shares if share <= (self.config.share if few else 1.0)]
        nearest = sorted(allowed, key=lambda share: abs(share - self.share))[:3]
        found = {}
        for self.share in nearest:
            self.propose()
            found[self.share] = nearness()
        self.share = max(nearest, key=found.__getitem__)
        self.propose()

    def proceed(self) -> None:
        """Go on from where the steps had got to before `propose`."""
        if self._ahead is not None:
            self.policy.load(self.slot, self._ahead)
            self._ahead = None

    def accept(self) -> None:
        """Go on from where the steps had got to: what they voted stands."""
        self.proceed()
        self._revoted.clear()

    def load(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], share: float | None = None
    ) -> None:
        """Go back to what was published; what was voted since the last `accept` is void.

        Without moments the optimizer starts afresh.

        Args:
            share: that was published then.
        """
        self.share = share or self.config.share
        for ballot in self._revoted:
            ballot.votes = ballot.scores
        self._revoted.clear()
        self.policy.load(self.slot, scaled(weights, 1 / self.share))
        self._average, self._ahead = self.policy.weights(self.slot), None
        self._optimizer.state.clear()
        for name, value in moments.items():
            kind, key = name.split(":", 1)
            parameter = self._parameters[key]
            # torch keeps the count of steps on the CPU and the moments beside the weights.
            self._optimizer.state[parameter][kind] = value.clone().to(
                "cpu" if kind == "step" else parameter.device
            )

    def remembered(self) -> set[str]:
        """Ids of the queries that have a say in what is learned now."""
        return self.memory.ids()

    def forget(self, ids: Iterable[str] | None = None) -> None:
        """Never replay some queries again, or any."""
        self.memory.forget(ids)
        self._replan(self._useful(self.memory.lessons(), self.memory.dependence()))

    def retreat(self, towards: Mapping[str, Tensor]) -> None:
        """Take the candidate half of the way back to other weights; the steps go on from there."""
        half = {key: (value + towards[key].to(value)) / 2 for key, value in self.policy.weights(self.slot).items()}
        self.policy.load(self.slot, half)
        self._ahead = self._average = scaled(half, 1 / self.share)

    # --- votes over views, neighbours and the stream ------------------------------------------------

    def _replay(self, queries: Sequence[Query]) -> tuple[StepMetrics, list[Query]]:
        """Vote on new queries, vote again on the remembered ones, and take steps on a mixture of both."""
        config = self.config
        worth = self.memory.worth()
        new = {query.id for query in queries if self._remember(query, worth.of(query))}
        lessons = [self._corrected(lesson) for lesson in self.memory.lessons()]
        dependence = self.memory.dependence()
        values = _describe_lessons(lessons, dependence)
        useful = self._useful(lessons, dependence)
        stood: list[_Standing] = []
        if not queries and (due := self._due(useful)):
            self._vote_again(due[:REVOTED])
        else:
            share = REPLAYED if queries else 1.0
            wanted = len(new) if queries else config.batch_size
            for _ in range(math.ceil(wanted * config.update_budget * share / config.batch_size)):
                if not (open_lessons := self._open(useful)):
                    break
                order = torch.randperm(len(open_lessons), generator=self._generator)[: config.batch_size]
                batch = [open_lessons[index] for index in order.tolist()]
                standings, norm = self._update_or_forget(batch)
                stood += standings
                values["grad_norm"] = norm
                for lesson in batch:
                    lesson.ballot.updates += 1
        values |= _describe_standings(stood)
        self._replan(useful)
        # Whatever is remembered has a say in what the others teach, so it counts as learned from.
        taught = [query for query in queries if query.id in new]
        return StepMetrics(len(queries), len(taught), values), taught

    def _remember(self, query: Query, worth: Mapping[str, float]) -> bool:
        views = safe_views(query.question)
        measured = self._asked % MEASURE_EVERY == 0 or self._asked < MEASURED or not worth
        self._asked += 1
        if not measured:
            views = views[:1] + _best(views[1:], worth)[: self.config.num_views - 1]
        config = self.config
        ballot = cast_ballot(
            self.policy, query, views, config.num_rollouts, config.max_tokens, self._generator, measured
        )
        if ballot is None or ballot.valid < config.min_valid:
            return False
        ballot.witness = self._asked % WITNESS_EVERY == 0
        self.memory.add(ballot)
        return True

    def _corrected(self, lesson: Lesson) -> Lesson:
        """The lesson with the true answer as its target, where an evaluation told it."""
        truth = self.truths.get(lesson.ballot.query.id)
        if truth not in lesson.ballot.answers:
            return lesson
        target = torch.zeros(len(lesson.target))
        target[lesson.ballot.answers.index(truth)] = 1.0
        divergence = -float(lesson.ballot.scores[SAME][lesson.ballot.answers.index(truth)])
        return replace(lesson, vote=target, target=target, divergence=divergence)

    def _useful(self, lessons: list[Lesson], dependence: float | None) -> list[Lesson]:
        """Lessons that may take part in steps: no witnesses, and a vote that is not hopeless.

        None of a question, or none at all, where the answers do not depend on the images: the same answer to every
        image is learned most easily without looking at them. And none where the votes say what is answered anyway.
        """
        config = self.config
        if dependence is not None and dependence < config.min_information:
            return []
        if not lessons or fmean(lesson.divergence for lesson in lessons) < FINISHED:
            return []
        useful = [
            each
            for each in lessons
            if not each.ballot.witness
            and each.majority >= config.agreement[0]
            and (each.rehearsed or each.dependence is None or each.dependence >= config.min_information)
        ]
        return [] if all(each.rehearsed for each in useful) else useful

    def _open(self, useful: list[Lesson]) -> list[Lesson]:
        """Lessons with budget left for the round of votes that they are in."""
        budget = self.config.update_budget
        return [each for each in useful if each.ballot.updates < budget + (each.ballot.rounds - 1) * (budget // 2)]

    def _due(self, useful: list[Lesson]) -> list[Ballot]:
        """Ballots to vote on again before any further step: the earliest round, once its budget is spent."""
        earliest = min((lesson.ballot.rounds for lesson in useful), default=self.config.rounds)
        due = [lesson for lesson in useful if lesson.ballot.rounds == earliest]
        if earliest >= self.config.rounds or not self.steps or self._open(due):
            return []
        return [lesson.ballot for lesson in due]

    def _replan(self, useful: list[Lesson]) -> None:
        self._unfinished = bool(self._open(useful) or self._due(useful))

    def _vote_again(self, ballots: list[Ballot]) -> None:
        """Let what would be published now vote beside the reference."""
        self.propose()
        for ballot in ballots:
            known = _best(ballot.scores, self.memory.worth().of(ballot.query))
            vote_again(self.policy, ballot, known[: self.config.num_views // 2])
            self._revoted.append(ballot)
        self.proceed()

    def _update_or_forget(self, lessons: list[Lesson]) -> tuple[list[_Standing], float]:
        """One gradient step; when it fails, nobody knows which of the remembered queries it was."""
        try:
            return self._update_lessons(lessons)
        except Exception:
            self.forget()
            raise

    def _update_lessons(self, lessons: list[Lesson]) -> tuple[list[_Standing], float]:
        """One gradient step on a few lessons, packed into few passes where the family and the memory allow it.

        Returns:
            how the adapter stood to each of them before, and the norm of the gradient.
        """
        self._optimizer.zero_grad(set_to_none=True)
        stood: list[_Standing] = []
        for part in self._parts([self._exercise(lesson) for lesson in lessons]):
            scored = self.policy.score_each(
                [each.observation for each in part], [[each.tokens[i] for i in each.answers] for each in part]
            )
            losses, found = zip(*map(self._loss, part, scored), strict=True)
            torch.autograd.backward(torch.stack(losses).sum() / len(lessons))
            stood += found
        return stood, self._descend()

    def _exercise(self, lesson: Lesson) -> _Exercise:
        """A lesson in one of its views, with the answers that are likely in the vote or in the reference."""
        view = self._view_to_learn(lesson.ballot)
        reference = lesson.ballot.scores[view]
        if lesson.rehearsed:
            lesson = replace(lesson, target=reference.exp(), shown=torch.zeros_like(lesson.shown))
        near = lesson.target + reference.exp()
        best = near.topk(min(MAX_TAUGHT, len(near))).indices.tolist()
        return _Exercise(lesson, lesson.ballot.observations[view], reference[best].log_softmax(-1), best)

    def _parts(self, exercises: list[_Exercise]) -> Iterator[list[_Exercise]]:
        """Exercises whose prompts and answers fit into memory together."""
        part: list[_Exercise] = []
        size = 0
        for each in exercises:
            length = each.observation.prompt.length
            own = length + sum(len(each.tokens[i]) + self.policy.family.copy_cost(length) for i in each.answers)
            if part and size + own > self._max_tokens:
                yield part
                part, size = [], 0
            part.append(each)
            size += own
        yield part

    def _loss(self, each: _Exercise, logprobs: Tensor) -> tuple[Tensor, _Standing]:
        """What one exercise costs, and how the adapter stands to it; from (M,) log-probabilities of answers."""
        lesson, best = each.lesson, each.answers
        device = logprobs.device
        target = (lesson.target[best] / lesson.target[best].sum()).to(device)
        # Reward q/p where there are votes and 0 for any other answer: the sum over all answers of
        # p * reward * grad log p is q * grad log p over the voted ones. Among these, p is the adapter's answer
        # times how often the stream shows it (logit adjustment, arXiv 2007.07314): what is learned is to tell
        # images apart, and not which answers are common. Answers that the stream does not show stay out of it.
        own = logprobs.log_softmax(-1)
        shown, prior = lesson.shown[best].to(device), lesson.prior[best].to(device)
        among = torch.where(shown, _adjusted(own, prior, shown), own) if bool(shown.any()) else own
        loss = -(target * among).sum() - logprobs.logsumexp(-1)
        divergence = (own.exp() * (own - each.reference.to(device))).sum()
        vote = lesson.vote[best].to(device)
        told = [divergence, (own.exp() * vote).sum(), (own.argmax() == vote.argmax()).to(own.dtype)]
        kl, reward, agrees = torch.stack(told).tolist()  # at once: each reading waits for the device
        asked_first = not lesson.ballot.updates and not lesson.rehearsed
        standing = _Standing(kl, reward, bool(agrees) if asked_first else None)
        return loss + self.config.kl_coefficient * divergence, standing

    def _view_to_learn(self, ballot: Ballot) -> str:
        """The image as it was sent half of the time, else another view, by what it is worth.

        The views that tell most look most like what the model was trained on: learning from them as well holds the
        adapter to the reference where the reference is good.
        """
        others = [view for view in ballot.observations if view != SAME]
        if not others or torch.rand((), generator=self._generator) < 0.5:
            return SAME
        worth = self.memory.worth().of(ballot.query)
        weights = view_weights({view: worth.get(view, 0.0) for view in others})
        draw = torch.multinomial(torch.tensor([*weights.values()]), 1, generator=self._generator)
        return others[int(draw)]

    # --- one group of rollouts at a time -------------------------------------------------------------

    def _roll_out(self, query: Query) -> Group:
        config = self.config
        return roll_out(self.policy, query, config.num_rollouts, config.max_tokens, self._generator, config.exact)

    def _teaches(self, group: Group) -> bool:
        """Enough valid answers, agreement within the band, and advantages that are not all zero."""
        low, high = self.config.agreement
        votes = group.votes
        if votes.valid < self.config.min_valid or not low <= votes.majority <= high:
            return False
        return self.config.reward == "random" or len(set(self._rewards(group))) > 1

    def _rewards(self, group: Group) -> list[float]:
        if self.config.reward == "random":
            return torch.rand(len(group.votes.answers), generator=self._generator).tolist()
        return REWARDS[self.config.reward](group.votes)

    def _learn_from_groups(self, queries: Sequence[Query]) -> tuple[StepMetrics, list[Query]]:
        """One group after the other: a single prompt's graph is alive, and its rollouts share its forward pass."""
        votes: list[Votes] = []
        taught: list[Query] = []
        stood: list[_Standing] = []
        self._optimizer.zero_grad(set_to_none=True)
        for query in queries:
            group = self._roll_out(query)
            votes.append(group.votes)
            if self._teaches(group):
                taught.append(query)
                stood.append(self._accumulate(group))
        values = _describe(votes) | _describe_standings(stood)
        if taught:
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad /= len(taught)
            values["grad_norm"] = self._descend()
        return StepMetrics(len(queries), len(taught), values), taught

    def _accumulate(self, group: Group) -> _Standing:
        """Add a group's gradient, a chunk of rollouts at a time."""
        rollouts, config = group.rollouts, self.config
        weights = rollouts.weights.to(group.prefix.logits.device)
        rewards = torch.tensor(self._rewards(group), device=weights.device)
        advantage = advantages(rewards, weights, rollouts.num, config.scale)
        if config.confidence:
            advantage = advantage * confidence_weight(group.votes)
        with self.policy.reference():
            reference = self.policy.begin(group.observation)
        prefix, leaves, ours = group.prefix.detached()
        divergence = sum(
            self._accumulate_chunk(
                prefix, reference, [rollouts.tokens[i] for i in rows], advantage[rows], weights[rows]
            )
            for rows in self._chunks(rollouts.tokens, self.policy.family.copy_cost(prefix.width))
        )
        known = [(tensor, leaf.grad) for tensor, leaf in zip(ours, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([tensor for tensor, _ in known], [gradient for _, gradient in known])
        return _Standing(divergence, float((weights * rewards).sum()))

    def _accumulate_chunk(
        self, prefix: Prefix, reference: Prefix, tokens: Tokens, advantage: Tensor, weights: Tensor
    ) -> float:
        family, config = self.policy.family, self.config
        with self.policy.reference():
            theirs, _ = tree.score(family, reference, tokens)
        logprobs, mask = tree.score(family, prefix, tokens)
        share = mask.to(logprobs.dtype)
        if config.per_token:
            share = share / share.sum(-1, keepdim=True)
        # On-policy: the rollouts were made by these very weights, so the old policy is this one, detached.
        loss = policy_loss(logprobs, logprobs.detach(), advantage, weights, share, config.clip)
        divergence = kl_penalty(logprobs, theirs, weights, share)
        torch.autograd.backward(loss + config.kl_coefficient * divergence)
        return float(divergence.detach())

    def _chunks(self, tokens: Tokens, more: int) -> Iterator[list[int]]:
        """Numbers of rollouts that fit into memory together with so much more each; the sorted ones share most."""
        rows: list[int] = []
        size = 0
        for row in sorted(range(len(tokens)), key=tokens.__getitem__):
            own = len(tokens[row]) + more
            if rows and size + own > self._max_tokens:
                yield rows
                rows, size = [], 0
            rows.append(row)
            size += own
        yield rows

    def _descend(self) -> float:
        """One optimizer step on the gradients that have been gathered; their norm."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.config.max_grad_norm)
        if not torch.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError("the gradient is not finite")
        self._optimizer.step()
        self.steps += 1
        for key, value in self.policy.weights(self.slot).items():
            self._average[key].lerp_(value, 1 - self.config.average)
        return float(norm)


def _adjusted(logprobs: Tensor, prior: Tensor, shown: Tensor) -> Tensor:
    """(M,) log-probabilities of which the shown ones share their own sum in proportion to their priors as well."""
    hidden = torch.where(shown, 0.0, -torch.inf)
    whole = (logprobs + hidden).logsumexp(-1)
    return (logprobs + prior + hidden).log_softmax(-1) + whole


def _best(views: Iterable[str], worth: Mapping[str, float]) -> list[str]:
    return sorted(views, key=lambda view: -worth.get(view, 0.0))


def _describe(votes: Sequence[Votes]) -> dict[str, float]:
    return {
        "majority": fmean(vote.majority for vote in votes),
        "entropy": fmean(vote.entropy for vote in votes),
        "valid": fmean(vote.valid for vote in votes),
        "distinct": fmean(float(len(vote.by_answer)) for vote in votes),
    }


def _describe_lessons(lessons: list[Lesson], dependence: float | None) -> dict[str, float]:
    if not lessons:
        return {}
    known = {} if dependence is None else {"information": dependence}
    return known | {
        "majority": fmean(lesson.majority for lesson in lessons),
        "entropy": fmean(float(torch.special.entr(lesson.vote).sum()) for lesson in lessons),
        "divergence": fmean(lesson.divergence for lesson in lessons),
        "valid": fmean(lesson.ballot.valid for lesson in lessons),
        "remembered": float(len(lessons)),
    }


def _describe_standings(stood: Sequence[_Standing]) -> dict[str, float]:
    if not stood:
        return {}
    values = {"kl": fmean(each.divergence for each in stood), "reward": fmean(each.reward for each in stood)}
    if first := [each.agrees for each in stood if each.agrees is not None]:
        values["prequential"] = fmean(first)
    return values
