"""What `servetune doctor` has found out about a model here: only data, so that to show it needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, computed_field


class ModelFacts(BaseModel):
    """What was loaded. `base_digest` is the fingerprint that versions and their stores name."""

    source: str
    family: str
    architecture: str
    parameters: int
    positions: int
    base_digest: str


class TemplateFacts(BaseModel):
    """How a question becomes a prompt.

    `native`: the checkpoint's own processor renders the same tokens; None where it cannot render. `replies`: the
    prompt ends where the answer is due. `stops`: what ends an answer in the template also ends generation.
    """

    file: str | None
    native: bool | None
    replies: bool
    stops: bool


class AnswerFacts(BaseModel):
    """Shares of `rollouts` sampled answers to the built-in probes.

    `valid`: finished within the token limit and not empty. `yes_or_no` and `letter` are of the probes that ask for
    one. `examples`: the commonest answers as written.
    """

    rollouts: int
    valid: float
    yes_or_no: float
    letter: float
    examples: list[str]


class AdapterFacts(BaseModel):
    """The LoRA: how many linear layers carry it, and where they are."""

    part: str
    rank: int
    modules: int
    language: int
    projector: int
    vision: int
    parameters: int
    share: float


class MemoryFacts(BaseModel):
    """Megabytes (10^6 bytes) on the device.

    `cache_mb`: keys and values of a probe with an answer of the most tokens; `longest_cache_mb`: of all positions.
    `step_mb`: growth of the peak in one learning step; `estimated` where it was scaled up or is a lower bound.
    `needed_mb`: server and worker together, beside what the programs themselves take.
    """

    weights_mb: float
    cache_mb: float
    longest_cache_mb: float | None
    step_mb: float
    estimated: bool
    needed_mb: float
    free_mb: float | None


class MachineFacts(BaseModel):
    """Where it runs. `redis` is None where there is none to keep queries in."""

    device: str
    dtype: str
    cores: int
    serve_threads: int
    worker_threads: int
    redis: str | None
    idle_gpu: bool


class SpeedFacts(BaseModel):
    """Seconds. `step_s` is for `step_queries` queries; `estimated` as in the memory."""

    load_s: float
    answer_s: float
    step_s: float
    step_queries: int
    estimated: bool


Outlook = Literal["unparsable", "too few", "blind", "settled", "unclear", "surer", "promising"]
"""What learning has to gain on some queries; `diagnosis.SENTENCES` says each in words."""


class DataFacts(BaseModel):
    """Whether learning has anything to gain on the operator's own queries; their answers were not read.

    `valid`: share of the rollouts. `entropy`: mean over queries of the answers' entropy in nats. `information`:
    nats that votes on the same question have about the images, None where no question was asked about two images.
    `divergence`: mean nats between votes and answers. `changed`: share of the queries on which the votes give
    another answer. `clearer`: whether some view of the images tells more about open questions than the image as
    sent, as far as these queries show; None where no question is open.
    """

    name: str
    asked: int
    valid: float
    entropy: float
    information: float | None
    divergence: float
    changed: float
    clearer: bool | None
    outlook: Outlook
    verdict: str


class Problem(BaseModel):
    """Something to mend, how, and what it keeps from working; None: it works, but not as well as it could."""

    problem: str
    advice: str
    blocks: Literal["serving", "learning"] | None = None


class Report(BaseModel):
    """Everything, and whether the model can serve and learn here."""

    model: ModelFacts
    template: TemplateFacts
    answers: AnswerFacts
    adapter: AdapterFacts
    memory: MemoryFacts
    machine: MachineFacts
    speed: SpeedFacts
    data: DataFacts | None
    problems: list[Problem]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def can_serve(self) -> bool:
        return all(each.blocks != "serving" for each in self.problems)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def can_learn(self) -> bool:
        return self.can_serve and all(each.blocks != "learning" for each in self.problems)
