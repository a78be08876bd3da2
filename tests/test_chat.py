"""Chat rendering: what is trained on, where it starts, and that sampling and training see the same tokens."""

import pytest

from posttrain.base.tokenizer import build_tokenizer
from posttrain.data.chat import check_parity, end_token_ids, render_conversation, render_prompt
from posttrain.errors import CheckpointError, DataError
from posttrain.records import Message

CONVERSATION = (
    Message("system", "Solve the puzzle."),
    Message("user", "Sum: 3 + 4"),
    Message("assistant", "Answer: 7"),
    Message("user", "Sum: 1 + 1"),
    Message("assistant", "Answer: 2"),
)

# ChatML: no generation markers, and a newline after the end of each turn.
CHATML = (
    "{% for message in messages %}<|header_start|>{{ message['role'] }}\n{{ message['content'] }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def chatml():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def trained_text(tokenizer, ids, mask):
    return tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])


def test_mask_covers_each_reply_and_the_token_that_ends_it(tokenizer):
    ids, mask = render_conversation(tokenizer, CONVERSATION)
    assert trained_text(tokenizer, ids, mask) == "Answer: 7<|eot|>Answer: 2<|eot|>"
    assert len(ids) == len(mask)


def test_records_and_dicts_render_alike(tokenizer):
    dicts = [{"role": message.role, "content": message.content} for message in CONVERSATION]
    assert render_conversation(tokenizer, dicts) == render_conversation(tokenizer, CONVERSATION)


def test_llama4_format(tokenizer):
    assert tokenizer.decode(render_prompt(tokenizer, CONVERSATION[:2])) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nSolve the puzzle.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nSum: 3 + 4<|eot|><|header_start|>assistant<|header_end|>\n\n"
    )


def test_prompt_is_a_prefix_of_the_conversation(tokenizer, chatml):
    for each in (tokenizer, chatml):
        check_parity(each, CONVERSATION)


def test_without_markers_the_mask_comes_from_prefixes(chatml):
    ids, mask = render_conversation(chatml, CONVERSATION)
    assert trained_text(chatml, ids, mask) == "Answer: 7<|eot|>Answer: 2<|eot|>"


def test_end_of_turn_outside_the_marker_is_still_trained_on(tokenizer):
    outside = build_tokenizer()
    outside.chat_template = CHATML.replace(
        "{{ message['content'] }}<|eot|>",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}<|eot|>",
    )
    ids, mask = render_conversation(outside, CONVERSATION)
    assert trained_text(outside, ids, mask) == "Answer: 7<|eot|>Answer: 2<|eot|>"


def test_template_that_rewrites_history_is_refused(chatml):
    # Some templates drop parts of earlier replies once another turn follows.
    chatml.chat_template = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] if loop.last or message['role'] != 'assistant' else 'cut' }}"
    )
    with pytest.raises(DataError, match="not a prefix"):
        render_conversation(chatml, CONVERSATION)


def test_parity_finds_another_header_for_sampling_than_for_training(chatml):
    chatml.chat_template = CHATML.replace(
        "<|header_start|>assistant\n{% endif %}", "<|header_start|>assistant {% endif %}"
    )
    with pytest.raises(DataError, match="prefix"):
        check_parity(chatml, CONVERSATION)


def test_parity_finds_markers_in_the_wrong_place(tokenizer):
    wrong = build_tokenizer()
    wrong.chat_template = tokenizer.chat_template.replace(
        "{%- generation %}{{- message['content'] | trim + '<|eot|>' }}",
        "{{- message['content'][:7] }}{%- generation %}{{- message['content'][7:] + '<|eot|>' }}",
    )
    with pytest.raises(DataError, match="generation markers"):
        check_parity(wrong, CONVERSATION)


def test_missing_template_says_what_to_set():
    bare = build_tokenizer()
    bare.chat_template = None
    with pytest.raises(CheckpointError, match=r"model\.path"):
        render_prompt(bare, CONVERSATION[:2])


def test_template_that_refuses_roles_is_a_data_error(chatml):
    chatml.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(DataError, match="no system turns here"):
        render_prompt(chatml, CONVERSATION[:2])


def test_conversation_without_a_reply_is_refused(tokenizer):
    with pytest.raises(DataError, match="assistant turn"):
        render_conversation(tokenizer, CONVERSATION[:2])


def test_end_token_ids(tokenizer):
    assert end_token_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|eot|>")]
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|end_of_text|>"
    assert end_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot|>"])
