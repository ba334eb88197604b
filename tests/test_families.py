"""Every supported family: answer, rollouts, exact gradients, one step, a swap, and plain PEFT reads the result.

The checkpoints are tiny and random, but their classes, processors and files are the real ones; none of the
video-capable processors can be built here, so their image-only form is what is tested.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from servetune.adapters import growth, search, tree
from servetune.adapters.family import Family, Prompt, PromptTooLong, UnsupportedModel, UnusableImage, image_tokens
from servetune.adapters.features import ByteCache
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Query
from servetune.adapters.versions import Draft
from servetune.clients.exports import unpack
from tests.checkpoints import FAMILIES
from tests.conftest import noise, query, stir

SEQUENCES = [(260, 261, 270, 300), (260, 261, 265, 300), (260, 300), (280,), (260, 261, 270, 300)]


@pytest.fixture(params=sorted(FAMILIES))
def made(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Policy:
    return Policy(Family.load(str(checkpoints[request.param])), LoraSpec(4, 8), ("candidate", "live"))


def rendered(policy: Policy, asked: Query) -> Prompt:
    """A query as the checkpoint itself takes it, with pixels."""
    return policy.family.prompt(asked.images, asked.question)


def whole_logits(policy: Policy, prompt: Prompt, sequence: tuple[int, ...]) -> torch.Tensor:
    """Logits of an ordinary forward pass over prompt and answer together, at the answer's tokens."""
    inputs = dict(prompt.inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([sequence])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if (kinds := inputs.get("mm_token_type_ids")) is not None:
        inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros(1, len(sequence), dtype=kinds.dtype)], 1)
    logits = policy.family.model(**inputs).logits[0].float()
    return tree.allowed(policy.family, logits)[prompt.length - 1 : -1]


def flat_gradient(policy: Policy) -> torch.Tensor:
    parameters = policy.parameters("candidate").values()
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return gradient


def test_the_tree_gives_the_logprobs_and_gradients_of_separate_passes(made: Policy) -> None:
    stir(made, "candidate")
    made.use("candidate")
    observation = made.observe(query())
    ours, mask = tree.score(made.family, made.begin(observation), SEQUENCES)
    (ours * mask).sum().backward()
    our_gradient = flat_gradient(made)
    total = torch.zeros(())
    for row, sequence in enumerate(SEQUENCES):
        logprobs = whole_logits(made, rendered(made, query()), sequence).log_softmax(-1)
        theirs = logprobs[range(len(sequence)), list(sequence)]
        torch.testing.assert_close(ours[row, : len(sequence)], theirs, atol=1e-5, rtol=1e-5)
        total = total + theirs.sum()
    total.backward()
    their_gradient = flat_gradient(made)
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() < 1e-5


def test_packed_prompts_give_what_each_gives_alone(made: Policy) -> None:
    """Whether or not the family can be packed, and with gradients; M-RoPE and deep features fall back."""
    stir(made, "candidate")
    made.use("candidate")
    asked = [query(), query(1, question="is this a rather longer question about a picture?"), query(2)]
    seen = [made.observe(each) for each in asked]
    sequences = [SEQUENCES, SEQUENCES[2:], SEQUENCES[:1]]
    packed = made.score_each(seen, sequences)
    torch.stack([each.sum() for each in packed]).sum().backward()
    our_gradient = flat_gradient(made)
    for ours, one, own in zip(packed, seen, sequences, strict=True):
        theirs, _ = tree.score(made.family, made.begin(one), own)
        theirs.sum().backward()
        torch.testing.assert_close(ours, theirs.sum(-1), atol=1e-4, rtol=1e-4)
    their_gradient = flat_gradient(made)
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() < 1e-4


def test_likely_labels_are_exact_where_it_matters(made: Policy) -> None:
    stir(made, "candidate", std=0.3)
    made.use("candidate")
    labels = ("red", "red cat", "red dog", "blue", "green cat", "a", "yes", "no", "elephant")
    seen = [made.observe(query(seed)) for seed in range(3)]
    found = made.likely_labels(seen, labels)
    with torch.no_grad():
        exact = torch.stack([made.label_logprobs(made.begin(one), labels) for one in seen])
    for ours, theirs in zip(found, exact, strict=True):
        near = theirs > theirs.max() - 5.9
        torch.testing.assert_close(ours[near], theirs[near], atol=1e-4, rtol=1e-4)
        assert bool((ours[~near] <= ours.max() - 5.8).all())


@pytest.mark.parametrize("std", [0.05, 1.0])
def test_a_search_finds_the_shares_of_a_long_list(made: Policy, std: float) -> None:
    """Peaked or not: every share is right within what the search may leave unexplored."""
    stir(made, "candidate", std=std)
    made.use("candidate")
    words = ("a", "cat", "dog", "red", "green", "blue", "yes", "no", "mat", "the")
    labels = tuple(f"{one} {two} {three}" for one in words for two in words for three in words[:3])
    with torch.no_grad():
        prefix = made.begin(made.observe(query()))
        exact = made.label_logprobs(prefix, labels)
    found = search.search(made.family, prefix, [made.family.tokens(label) for label in labels])
    assert len(found) == 300
    torch.testing.assert_close(found.softmax(-1), exact.softmax(-1), atol=search.EPSILON, rtol=0)
    assert int(found.argmax()) == int(exact.argmax())
    torch.testing.assert_close(found.max(), exact.max(), atol=1e-3, rtol=1e-3)


def test_a_search_does_not_feed_what_cannot_matter(made: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = tuple(f"{one} {two}" for one in "abcdefghijklmnop" for two in "abcdefghijklmnop")
    fed: list[int] = []
    whole = made.family.extend

    def counted(cache: Any, tokens: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        fed.append(tokens.numel())
        return whole(cache, tokens, *rest, **named)

    monkeypatch.setattr(made.family, "extend", counted)
    with torch.no_grad():
        prefix = made.begin(made.observe(query()))
        prefix.logits = torch.zeros_like(prefix.logits)
        prefix.logits[0, made.family.tokens(labels[40])[0]] = 100.0
    found = search.search(made.family, prefix, [made.family.tokens(label) for label in labels])
    whole_trie = tree.Trie([made.family.tokens(label) for label in labels])
    assert sum(fed) < len(whole_trie.inner) / 4
    assert labels[int(found.argmax())].startswith(labels[40][0])


def test_greedy_answers_are_those_of_generate(made: Policy) -> None:
    stir(made, "candidate")
    made.use("candidate")
    observation = made.observe(query())
    with torch.no_grad():
        ours = growth.sample(made.family, made.begin(observation), 1, 6, temperature=0.0)[0]
        theirs = made.family.model.generate(
            **rendered(made, query()).inputs,
            max_new_tokens=6,
            do_sample=False,
            bad_words_ids=[[token] for token in made.family.forbidden.tolist()],
        )[0, observation.prompt.length :]
    assert ours.tokens == tuple(theirs.tolist())


def test_answers_to_several_prompts_are_those_of_each(made: Policy) -> None:
    """Whether or not the family can be packed; rows end at different times."""
    stir(made, "candidate", std=0.3)
    made.use("candidate")
    asked = [query(seed, question="is it red? " * (1 + seed % 3)) for seed in range(5)]
    seen = made.observe_each(asked)
    with torch.no_grad():
        together = growth.sample_each(made.begin_each(seen), 1, 6, temperature=0.0)
        for (ours,), one in zip(together, seen, strict=True):
            alone = growth.sample(made.family, made.begin(one), 1, 6, temperature=0.0)[0]
            assert (ours.tokens, ours.finished) == (alone.tokens, alone.finished)
            assert ours.logprob == pytest.approx(alone.logprob, abs=1e-3)
        drawn = growth.sample_each(made.begin_each(seen), 16, 6, generator=torch.Generator().manual_seed(0))
        scored = made.score_each(seen, [[sample.tokens for sample in samples] for samples in drawn])
    for samples, logprobs in zip(drawn, scored, strict=True):
        assert sum(sample.count for sample in samples) == 16
        torch.testing.assert_close(logprobs, torch.tensor([s.logprob for s in samples]), atol=1e-3, rtol=1e-3)


def test_rows_with_adapters_of_their_own_are_answered_as_by_each(made: Policy) -> None:
    """Slots side by side and scattered, the base among them; rows end at different times."""
    stir(made, "candidate", std=0.3, seed=1)
    stir(made, "live", std=0.3, seed=2)
    slots = ("candidate", "live", None, "live", "live", "candidate")
    asked = [query(seed % 2, question="is it red? " * (1 + seed % 3)) for seed in range(len(slots))]
    seen, cache = made.observe_each(asked), ByteCache(10**8)
    made.use(None)
    with torch.no_grad():
        for _ in range(2):  # fed, then from the cache
            prefixes = made.begin_each(seen, [str(slot) for slot in slots], cache, slots)
            together = growth.sample_each(prefixes, 1, 6, temperature=0.0)
            scored = tree.score_each(prefixes, [SEQUENCES] * len(slots))
            for (ours,), logprobs, one, slot in zip(together, scored, seen, slots, strict=True):
                made.use(slot)
                prefix = made.begin(one)
                alone = growth.sample(made.family, prefix, 1, 6, temperature=0.0)[0]
                assert ours.tokens == alone.tokens
                assert ours.logprob == pytest.approx(alone.logprob, abs=1e-3)
                theirs, _ = tree.score(made.family, prefix, SEQUENCES)
                torch.testing.assert_close(logprobs, theirs.sum(-1), atol=1e-3, rtol=1e-3)
                made.use(None)
    assert made._choice.rows is None


def test_pictures_seen_together_are_those_seen_alone(made: Policy) -> None:
    prompts = [rendered(made, query(seed)) for seed in range(3)]
    with torch.no_grad():
        for ours, prompt in zip(made.family.see_each(prompts), prompts, strict=True):
            torch.testing.assert_close(
                image_tokens(ours), image_tokens(made.family.see(prompt)), atol=1e-4, rtol=1e-4
            )


def test_sampled_logprobs_are_the_scored_ones(made: Policy) -> None:
    with torch.no_grad():
        prefix = made.begin(made.observe(query()))
        samples = growth.sample(made.family, prefix, 32, 6, generator=torch.Generator().manual_seed(0))
        scored, _ = tree.score(made.family, prefix, [sample.tokens for sample in samples])
    assert sum(sample.count for sample in samples) == 32
    torch.testing.assert_close(scored.sum(-1), torch.tensor([s.logprob for s in samples]), atol=1e-4, rtol=1e-4)


def test_tokens_are_as_likely_as_they_are_scored(made: Policy) -> None:
    stir(made, "candidate")
    made.use("candidate")
    with torch.no_grad():
        prefix = made.begin(made.observe(query()))
        own, best, which = tree.likelihoods(made.family, prefix, SEQUENCES[0], 3)
        scored, _ = tree.score(made.family, prefix, [SEQUENCES[0]])
        greedy = growth.sample(made.family, prefix, 1, 4, temperature=0.0)[0].tokens
        likeliest = tree.likelihoods(made.family, prefix, greedy, 1)[2][:, 0].tolist()
    torch.testing.assert_close(own, scored[0], atol=1e-5, rtol=1e-5)
    assert best.shape == which.shape == (len(SEQUENCES[0]), 3)
    assert bool((best[:, 0] >= own - 1e-6).all())
    assert tuple(likeliest) == greedy


def test_lora_sits_on_the_language_model_alone(made: Policy) -> None:
    wrapped = {key.split("base_model.model.")[1].rsplit(".lora_", 1)[0] for key in made.parameters("live")}
    assert wrapped
    assert all(name.startswith(made.family.decoder_name) for name in wrapped)


def test_a_step_moves_the_adapter_and_plain_peft_loads_the_version(
    made: Policy, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    made.load("candidate", made.zero_weights())
    config = LearnerConfig.named("frequency", learning_rate=1e-2, agreement=(0, 1), min_valid=0, max_tokens=4)
    learner = Learner(made, config)
    metrics, taught = learner.step([query(1), query(2, labels=("red", "green cat", "blue dog"))])
    assert metrics.informative == len(taught) >= 1
    made.use("candidate")
    probe = made.probe()
    made.use(None)
    assert probe != made.probe()

    store = AdapterStore(tmp_path)
    store.initialise(made.zero_weights(), made.peft_config(), made.base_digest, made.probe())
    weights, moments = learner.state()
    version = store.publish(Draft(weights, "worker", 0, probe, optimizer=moments)).version
    exported = unpack(io.BytesIO(b"".join(store.export(version))), tmp_path / "out")
    base = AutoModelForImageTextToText.from_pretrained(made.family.source)
    plain = PeftModel.from_pretrained(base, exported).eval()
    observation = made.observe(query())
    made.use("candidate")
    with torch.no_grad():
        theirs = plain(**rendered(made, query()).inputs).logits[:, -1]
        torch.testing.assert_close(made.begin(observation).logits, theirs, atol=1e-4, rtol=1e-4)


def test_special_tokens_in_a_question_stay_text(made: Policy) -> None:
    special = " ".join(made.family.tokenizer.get_added_vocab())
    plain, hostile = (made.family.prompt([noise()], text).inputs["input_ids"] for text in ("hi", f"hi {special}"))
    for token in made.family.forbidden.tolist():
        assert (plain == token).sum() == (hostile == token).sum()


SPACED = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@pytest.mark.parametrize(("template", "written"), [(None, "cat"), (SPACED, " cat")])
def test_a_label_is_scored_as_the_template_sets_an_answer(tiny: Path, template: str | None, written: str) -> None:
    family = Family.load(str(tiny))
    family.template = template or family.template
    ids = family.tokenizer(written, add_special_tokens=False)["input_ids"]
    assert family.tokens("cat") == (*ids, family.tokenizer.convert_tokens_to_ids("<|im_end|>"))


@pytest.mark.parametrize("label", ["<image>", "<image> cat", "<|im_end|>"])
def test_a_label_that_spells_a_special_token_is_plain_text(tiny: Path, label: str) -> None:
    policy = Policy(Family.load(str(tiny)), LoraSpec(4, 8), ("candidate",))
    asked = query(labels=(label, "cat"))
    with torch.no_grad():
        logprobs = policy.label_logprobs(policy.begin(policy.observe(asked)), asked.labels)
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("size", [(1, 300), (2000, 3)])
def test_an_image_is_taken_or_refused_as_one(made: Policy, size: tuple[int, int]) -> None:
    """Qwen's processors refuse long thin images; whoever sent one is told."""
    asked = Query("q", (noise(size=size),), "what is this?")
    if "Qwen" in type(made.family.model).__name__:
        with pytest.raises(UnusableImage, match=f"{size[0]}x{size[1]}"):
            made.observe(asked)
    else:
        made.observe(asked)


def test_a_prompt_longer_than_the_model_is_refused(tiny: Path) -> None:
    family = Family.load(str(tiny))
    with pytest.raises(PromptTooLong, match=str(family.max_length)):
        family.prompt([noise()], "what is this? " * family.max_length)


@pytest.mark.parametrize("longest", [3, 9])
def test_attention_in_blocks_is_that_of_the_whole_tree(
    made: Policy, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    """Groups of unlike sizes, some of them in one block; log-probabilities and gradients."""
    stir(made, "candidate")
    made.use("candidate")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (24,), generator=generator).tolist()
    sequences = [
        (260 + number % 7, *torch.randint(260, 300, (length,), generator=generator).tolist())
        for number, length in enumerate(lengths)
    ]
    found = []
    for cost in (0, 10**9):
        monkeypatch.setattr(tree, "COPY_COST", cost)
        grouped = tree.Trie(sequences).groups(1)
        assert (grouped is None) == bool(cost)
        logprobs, mask = tree.score(made.family, made.begin(made.observe(query())), sequences)
        (logprobs * mask).sum().backward()
        found.append((logprobs.detach(), flat_gradient(made)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert (found[0][1] - found[1][1]).norm() / found[1][1].norm() < 1e-5


def test_layers_that_keep_something_unknown_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    made = shutil.copytree(checkpoints["gemma3"], tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    config["text_config"]["layer_types"][0] = "indexed_attention"
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"indexed_attention: servetune knows .*sliding_attention"):
        Family.load(str(made))
