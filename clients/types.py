"""The wire types: one definition, used by the SDK to parse and by the server to answer.

Requests refuse unknown fields (a typo is an error); results accept them, so that an older SDK can read a
newer server.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)

Task = Literal["vqa", "recognition"]
Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Question = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]
AdapterChoice = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
AdapterPath = Annotated[
    str, StringConstraints(pattern=r"^([a-z0-9][a-z0-9._-]{0,63}@)?[a-z0-9][a-z0-9._-]{0,63}$")
]


MAX_ANSWER_TOKENS = 8192
"""Most tokens that one open question may cost: the answers asked for times their length."""


class Request(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Result(BaseModel):
    """Base of everything the server returns."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


# --- POST /v1/answer ---------------------------------------------------------------------------------


class ImageUrl(Request):
    """An image by address: `https://…` (off by default) or a `data:` URI."""

    url: str = Field(max_length=20_000_000)


class ImageData(Request):
    """An image as base64 text."""

    data: str = Field(max_length=20_000_000)
    media_type: Literal["image/jpeg", "image/png", "image/webp"] | None = None


ImageInput = Annotated[str, Field(max_length=20_000_000)] | ImageUrl | ImageData


class AnswerRequest(Request):
    """One question about an image. With `candidate_labels` it is recognition, otherwise VQA; with `task:
    recognition` alone the labels are those of the adapter's settings.

    A plain string as image is a URL, a `data:` URI or bare base64.
    """

    image: ImageInput | None = None
    images: Annotated[list[ImageInput], Field(min_length=1, max_length=8)] | None = None
    question: Question | None = None
    candidate_labels: Annotated[list[Label], Field(min_length=2, max_length=1000)] | None = None
    task: Task | None = None
    top_k: int | None = Field(None, ge=1, le=1000, description="candidates to return; 5 for recognition")
    n: int = Field(1, ge=1, le=64, description="VQA: answers to sample and vote over")
    max_tokens: int = Field(32, ge=1, le=1024)
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    adapter: AdapterPath = Field(
        "live",
        description="`live`, another alias, `base` or a version `v0007`; of another adapter, `tenant-a@live`",
    )
    adapt: bool | Literal["now"] = Field(
        True, description="may this query be kept for learning? `now`: also look again before answering"
    )
    deadline_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="with `adapt: now`: seconds to answer in, as far as possible"
    )
    stream: bool = Field(False, description="VQA: tell the answer while it grows, as server-sent events")
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None

    @property
    def is_choice(self) -> bool:
        """Is it recognition? Without labels of its own it chooses among those that the adapter's settings name."""
        return self.candidate_labels is not None or self.task == "recognition"

    @field_validator("adapter", mode="before")
    @classmethod
    def _null_is_live(cls, value: object) -> object:
        return "live" if value is None else value

    @field_validator("adapt", mode="wrap")
    @classmethod
    def _known(cls, value: object, check: ValidatorFunctionWrapHandler) -> object:
        try:
            return check(value)
        except ValidationError:
            raise ValueError("give true, false or 'now'") from None

    @model_validator(mode="after")
    def _consistent(self) -> AnswerRequest:
        if (self.image is None) == (self.images is None):
            raise ValueError("give exactly one of 'image' and 'images'")
        if self.candidate_labels is not None and len(set(self.candidate_labels)) < len(self.candidate_labels):
            raise ValueError("'candidate_labels' must be unique")
        if self.task == "vqa" and self.candidate_labels is not None:
            raise ValueError("task 'vqa' takes no 'candidate_labels'")
        if not self.is_choice and self.question is None:
            raise ValueError("give a 'question', or 'candidate_labels' to choose from")
        if self.n > 1 and self.is_choice:
            raise ValueError("'n' is for VQA: recognition already returns the whole distribution")
        if not self.is_choice and max(self.n, self.top_k or 1) * self.max_tokens > MAX_ANSWER_TOKENS:
            raise ValueError(f"'n' or 'top_k' times 'max_tokens' may be at most {MAX_ANSWER_TOKENS}")
        if self.stream and (self.is_choice or self.n > 1 or self.adapt == "now"):
            raise ValueError("'stream' is for one open answer: not with labels, 'n' above 1 or 'adapt': 'now'")
        if self.deadline_s is not None and self.adapt != "now":
            raise ValueError("'deadline_s' is for 'adapt': 'now'")
        if self.n > 1 and self.temperature == 0:
            raise ValueError("'n' above 1 needs a 'temperature' above 0")
        return self


class BatchRequest(Request):
    """Several questions, each answered by itself."""

    requests: Annotated[list[AnswerRequest], Field(min_length=1, max_length=256)]


class Delta(Result):
    """What is new of an answer that grows."""

    text: str


class AdapterRef(Result):
    """The adapter that made an answer. `version` is `v0000` for the untouched base model."""

    name: str
    version: str
    alias: str | None = None
    digest: str


class Candidate(Result):
    """One possible answer with its probability: `label` in recognition, `answer` in VQA."""

    label: str | None = None
    answer: str | None = None
    score: float


class Diagnostics(Result):
    """How much to trust `confidence`.

    `label_mass`: probability that the model, left free, would have answered one of the labels.
    `argmax_is_label`: the likeliest first token begins one of the labels.
    `votes`: share of each sampled answer (VQA, n > 1). `entropy`: of `candidates` or `votes`, in nats.
    """

    label_mass: float | None = None
    argmax_is_label: bool | None = None
    votes: dict[str, float] | None = None
    entropy: float | None = None


def _is_none(value: object) -> bool:
    return value is None


class Adaptation(Result):
    """Whether this query was kept for learning and, if not, why.

    With status `now`, `queued` says whether it was kept, `views` how many looks were pooled into the answer (1: it
    is the plain one), and `rollouts` how many answers to an open question were drawn for that. Else they are None.
    """

    status: Literal["queued", "skipped", "now"]
    query_id: str | None = None
    reason: str | None = None
    queued: Annotated[bool | None, Field(exclude_if=_is_none)] = None
    views: Annotated[int | None, Field(exclude_if=_is_none)] = None
    rollouts: Annotated[int | None, Field(exclude_if=_is_none)] = None


class Usage(Result):
    """Tokens in the prompt (image tokens included) and in the answer."""

    input_tokens: int
    output_tokens: int


class Timings(Result):
    """Seconds waited for the engine and seconds computed."""

    queue_s: float
    inference_s: float


class Answer(Result):
    """The response to `POST /v1/answer`. `answer` is null where the model gave none (`unparsed`)."""

    id: str
    object: Literal["answer"] = "answer"
    created: int
    model: str
    adapter: AdapterRef
    task: Task
    answer: str | None
    confidence: float | None
    confidence_source: Literal["label_probability", "sequence_probability", "vote_share", "pooled_probability"]
    candidates: list[Candidate]
    finish_reason: Literal["stop", "length", "unparsed"]
    diagnostics: Diagnostics
    adaptation: Adaptation
    usage: Usage
    timings: Timings


# --- POST /v1/answers/{id}/feedback ------------------------------------------------------------------


class FeedbackRequest(Request):
    """Whether an answer was right, or what the right one is. The text is compared and not kept."""

    correct: StrictBool | None = None
    answer: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> FeedbackRequest:
        if self.correct is None and self.answer is None:
            raise ValueError("give 'correct', or the right 'answer'")
        return self


class Feedback(Result):
    """What feedback was counted as, and for which version."""

    id: str
    adapter: str
    version: str
    correct: bool


# --- adapters and adaptation (admin key) -------------------------------------------------------------

# Described as a list of two: makers of clients stumble over tuples.
_TWO = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
Steps = Annotated[tuple[int, int], WithJsonSchema(_TWO)]


class VersionInfo(Result):
    """An immutable version of an adapter, as its manifest describes it.

    `temperature` divides its log-probabilities before they are shown as confidence. One that is not `servable` was
    made for a base model, of that `base_digest`, which its adapter had before. `pinned`: the operator keeps its
    weights. `retired`: retention deleted them, and it can no longer be served.
    """

    version: str
    parent: str | None = None
    created: float
    origin: Literal["base", "worker", "snapshot", "reset", "import"]
    label: str | None = None
    digest: str
    base_digest: str
    rank: int
    target_modules: list[str] | str
    servable: bool = True
    step_range: Steps | None = None
    num_queries: int = 0
    temperature: float = 1.0
    metrics: dict[str, float] = {}
    gate: dict[str, Any] | None = None
    metadata: dict[str, str] = {}
    pinned: bool = False
    retired: bool = False


class AdapterInfo(Result):
    """A named line of versions. `serving` is what this process answers with, `aliases` what is wanted."""

    name: str
    aliases: dict[str, str]
    live: str
    serving: str
    generation: int
    num_versions: int
    resident: list[str]
    leases: dict[str, int]
    mode: Mode = "live"


Mode = Literal["off", "observe", "canary", "live"]


class AdapterSettings(Result):
    """How an adapter behaves.

    `mode`: `off` keeps and learns nothing; `observe` learns, and what the gate accepts becomes the alias
    `candidate`; `canary` also has `canary_share` of the requests for `live` answered by it; `live` serves what the
    gate accepts. `labels`: of recognition that names none.
    """

    mode: Mode
    canary_share: float
    labels: list[str]


class SettingsRequest(Request):
    """What is to change; the rest stays."""

    mode: Mode | None = None
    canary_share: float | None = Field(None, ge=0, le=1)
    labels: Annotated[list[Label], Field(max_length=1000)] | None = None

    @field_validator("labels")
    @classmethod
    def _a_choice(cls, labels: list[str] | None) -> list[str] | None:
        if labels is not None and (len(labels) == 1 or len(set(labels)) < len(labels)):
            raise ValueError("give two or more labels, each once, or none")
        return labels


class ProbeItem(Request):
    """A question about an image, whose answer the operator knows; with labels it is one of them."""

    image: ImageInput
    answer: Label
    question: Question | None = None
    candidate_labels: Annotated[list[Label], Field(min_length=2, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ProbeItem:
        if self.candidate_labels is None and self.question is None:
            raise ValueError("give a 'question', or 'candidate_labels' to choose from")
        if self.candidate_labels is not None and self.answer not in self.candidate_labels:
            raise ValueError("'answer' must be one of 'candidate_labels'")
        return self


class ProbesRequest(Request):
    probes: Annotated[list[ProbeItem], Field(min_length=1, max_length=500)]


class ProbeSetInfo(Result):
    """A labelled probe set. The gate judges by the one that is `active`."""

    version: str
    created: float
    num_probes: int
    active: bool


class CreateRequest(Request):
    name: AdapterName


class SnapshotRequest(Request):
    label: AdapterChoice  # it becomes an alias, and an alias must be one that can be asked for
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] = {}


class PromoteRequest(Request):
    version: AdapterChoice


class RollbackRequest(Request):
    to: AdapterChoice | None = None


class ResetRequest(Request):
    to: AdapterChoice = "base"
    purge_buffer: StrictBool = False


QueryId = Annotated[str, Field(min_length=1, max_length=64)]


class EraseRequest(Request):
    query_ids: Annotated[list[QueryId], Field(min_length=1, max_length=1000)]


class Erased(Result):
    """What erasing queries did: how many waited, which versions are gone, and what is live now."""

    withdrawn: int
    dropped: list[str]
    live: str
    serving: str


class FeedbackCounts(Result):
    """Feedback on the answers of one version."""

    correct: int = 0
    incorrect: int = 0


class BufferStatus(Result):
    """The query buffer: `connected` false means answers go on and nothing is learned.

    `kept`: queries that are kept for review, learned from or not. `feedback`: on answers, by version.
    """

    connected: bool
    waiting: int = 0
    pending: int = 0
    dead: int = 0
    bytes: int = 0
    oldest_age_s: float = 0.0
    ledger: dict[str, int] = {}
    kept: int = 0
    feedback: dict[str, FeedbackCounts] = {}


class WorkerStatus(Result):
    """The last word of the worker; `state` is `absent` when its heartbeat is older than its lease.

    While it is `waiting`, for its `window` or its `budget`, `note` says so to people; `waits_until` is in seconds
    since 1970.
    """

    state: Literal["absent", "idle", "learning", "waiting", "paused", "degraded"]
    waits_for: Literal["window", "budget"] | None = None
    waits_until: float | None = None
    note: str | None = None
    version: str | None = None
    steps: int = 0
    last_step: dict[str, float] = {}
    last_verdict: dict[str, Any] | None = None
    error: str | None = None


class AdaptationStatus(Result):
    """Is it learning, from what, and how far is serving behind?"""

    adapter: str
    paused: bool
    live: str
    serving: str
    lag_versions: int
    buffer: BufferStatus
    worker: WorkerStatus
    mode: Mode = "live"


class Event(Result):
    """Something that happened to an adapter, with numbers and names and nothing that anybody sent.

    `kind`: `step`, `verdict`, `publish`, `swap`, `snapshot`, `promote`, `rollback`, `reset`, `import`, `pin`,
    `unpin`, `retire`, `settings`, `probes`, `dismiss`, `pause`, `resume`, `erase`, `degraded` or `base_mismatch`;
    `status`, which has no id and is not kept, says how things stand. `time` is in seconds since 1970.
    """

    id: str | None = None
    time: float
    adapter: str
    kind: str
    data: dict[str, Any] = {}


class Series(Result):
    """A stretch of an adapter's history. `columns` has a number, or null, for each step; `marks` are other events.

    `last_event_id`: of the newest event in it; what comes after it is what `since` and `Last-Event-ID` ask for.
    """

    adapter: str
    columns: dict[str, list[float | None]]
    marks: list[Event]
    last_event_id: str | None = None


# --- two versions compared on kept queries (admin key) -----------------------------------------------


class Pair(Result):
    """A query that two versions answer differently; which of them comes first is not told.

    `images`: as `data:` URIs, at most 1024 pixels a side. An answer is null where a version gave none.
    """

    id: str
    question: str
    labels: list[str] = []
    images: list[str]
    first: str | None
    second: str | None


class NextPair(Result):
    """The next pair to judge; without one, `left` queries are still to be compared: ask again."""

    pair: Pair | None = None
    left: int


class JudgeRequest(Request):
    """Which answer of a pair is right, by the versions that were asked for it."""

    id: QueryId
    choice: Literal["first", "second", "both", "neither"]
    old: AdapterChoice = "base"
    new: AdapterChoice = "live"


class Review(Result):
    """Is version `new` better than `old`? `kept` queries are there to compare them on.

    `compared`: queries that both have answered, `different` of them not alike; of these some were judged: only
    `old` or `new` was right, `both`, or `neither`. `gain`: how many more of the compared queries `new` answers
    rightly, as a share of them, those included that both answer alike; `low` to `high` is its 95 % interval. None
    without a judgement.
    """

    adapter: str
    old: str
    new: str
    kept: int
    compared: int
    different: int
    judged: int
    only_old: int
    only_new: int
    both: int
    neither: int
    gain: float | None = None
    low: float | None = None
    high: float | None = None


class Change(Result):
    """Something that two versions differ in."""

    old: Any = None
    new: Any = None


class ChangedAnswer(Result):
    """A kept query that two versions answer differently. `images`: small, as `data:` URIs, where asked for."""

    query_id: str
    question: str
    labels: list[str] = []
    images: list[str] = []
    old: str | None
    new: str | None


class VersionDiff(Result):
    """What lies between two versions: facts of their manifests, numbers of their steps and gates, and answers.

    `compared`: kept queries that were answered by both for `answers`, the newest first. `next_after`: what to give
    as `after` to go on with older ones; null where there are none, or where as many changed as were asked for.
    """

    adapter: str
    old: str
    new: str
    facts: dict[str, Change]
    metrics: dict[str, Change]
    gate: dict[str, Change]
    compared: int
    answers: list[ChangedAnswer]
    next_after: str | None = None


class AuditEntry(Result):
    """One administrative act."""

    timestamp: float
    event: str
    actor: str
    request_id: str | None = None
    details: dict[str, Any] = {}


Row = TypeVar("Row")


class Page(Result, Generic[Row]):
    """One page of a listing; `next_cursor` is null on the last."""

    data: list[Row]
    next_cursor: str | None = None


class Problem(Result):
    """RFC 9457 problem document, with a stable `code` and the field it is about."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    code: str
    param: str | None = None
    request_id: str | None = None


class BatchItem(Result):
    """What became of one question of a batch: an answer, or why there is none."""

    answer: Answer | None = None
    problem: Problem | None = None


class BatchReply(Result):
    """One item for each question, in their order."""

    results: list[BatchItem]


class Info(Result):
    """What is running; `serving` is the version that answers now."""

    version: str
    model: str
    base_digest: str
    adapter: str
    serving: str | None = None
    engine: str
    device: str
    dtype: str
    limits: dict[str, int]
