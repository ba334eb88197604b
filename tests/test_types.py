"""The wire contract: strict in what is sent, lenient in what is received."""

import pytest
from pydantic import ValidationError

from servetune.clients.types import AnswerRequest, Info, ResetRequest, SnapshotRequest, Usage

IMAGE = {"data": "aGk=", "media_type": "image/png"}


def test_a_misspelt_field_is_an_error():
    with pytest.raises(ValidationError, match="quesiton"):
        AnswerRequest.model_validate({"image": IMAGE, "quesiton": "what?"})


def test_a_result_may_carry_fields_this_version_does_not_know():
    usage = Usage.model_validate({"input_tokens": 3, "output_tokens": 1, "cached_tokens": 2})
    assert usage.model_dump()["cached_tokens"] == 2


def test_requests_and_results_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Usage(input_tokens=1, output_tokens=1).input_tokens = 2
    with pytest.raises(ValidationError, match="frozen"):
        ResetRequest().to = "latest"


@pytest.mark.parametrize("image", ["https://example.org/a.png", "data:image/png;base64,aGk=", {"url": "u"}, IMAGE])
def test_an_image_has_three_forms(image):
    assert AnswerRequest.model_validate({"image": image, "question": "what?"}).image is not None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"question": "q"}, "exactly one of 'image' and 'images'"),
        ({"image": IMAGE, "question": "q", "top_k": 300, "max_tokens": 1024}, "times 'max_tokens'"),
        ({"image": IMAGE, "question": "q", "n": 64, "temperature": 1, "max_tokens": 1024}, "times 'max_tokens'"),
        ({"image": IMAGE, "images": [IMAGE], "question": "q"}, "exactly one of"),
        ({"image": IMAGE}, "give a 'question'"),
        ({"image": IMAGE, "question": "   "}, "at least 1 character"),
        ({"image": IMAGE, "candidate_labels": ["a"]}, "at least 2 items"),
        ({"image": IMAGE, "candidate_labels": ["a", " a "]}, "must be unique"),
        ({"image": IMAGE, "candidate_labels": ["a", "b"], "task": "vqa"}, "takes no"),
        ({"image": IMAGE, "task": "recognition", "n": 4}, "'n' is for VQA"),
        ({"image": IMAGE, "candidate_labels": ["a", "b"], "n": 4}, "'n' is for VQA"),
        ({"image": IMAGE, "question": "q", "n": 4}, "needs a 'temperature'"),
        ({"image": IMAGE, "candidate_labels": ["a", "b"], "stream": True}, "'stream' is for one open answer"),
        (
            {"image": IMAGE, "question": "q", "n": 2, "temperature": 1, "stream": True},
            "'stream' is for one open answer",
        ),
        ({"image": IMAGE, "question": "q", "adapt": "now", "stream": True}, "'stream' is for one open answer"),
        ({"image": IMAGE, "question": "q", "adapter": "../secret"}, "should match pattern"),
        ({"image": IMAGE, "question": "q", "adapter": "live\n"}, "should match pattern"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        AnswerRequest.model_validate(fields)


def test_whatever_a_snapshot_may_be_called_can_be_asked_for():
    label = SnapshotRequest(label="before-upgrade_1.0").label
    assert AnswerRequest(image="data:,", question="q", adapter=label).adapter == label
    with pytest.raises(ValidationError, match="should match pattern"):
        SnapshotRequest(label="Before")


def test_an_older_server_need_not_say_what_it_serves():
    fields = ("version", "model", "base_digest", "adapter", "engine", "device", "dtype")
    assert Info.model_validate({**dict.fromkeys(fields, "x"), "limits": {}}).serving is None


def test_no_choice_of_an_adapter_is_live():
    asked = AnswerRequest.model_validate({"image": IMAGE, "question": "what?", "adapter": None})
    assert asked.adapter == "live"
