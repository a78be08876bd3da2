"""A chat template must write what people say as they said it, and one BOS token."""

from pathlib import Path
from typing import Any

import pytest
from template_families import CHATML, FAMILIES, LLAMA3, R1, tokenizer_of

from posttrain.config.templates import ChatTemplateConfig, builtin_names
from posttrain.data.templates import builtin_template
from posttrain.data.verbatim import template_problem
from posttrain.errors import CheckpointError, ConfigError
from posttrain.model.tokenizer import load_tokenizer

CONTENT = "{{ m.content }}"


def problem(template: str, family: str = "chatml") -> str | None:
    return template_problem(tokenizer_of(FAMILIES[family], template))


def test_templates_of_all_families_pass() -> None:
    for name, family in FAMILIES.items():
        assert template_problem(tokenizer_of(family)) is None, name
    assert problem(R1, "r1") is None
    for name in builtin_names():
        assert problem(builtin_template(name)) is None, name


@pytest.mark.parametrize(
    "changed",
    [
        "{{ m.content | upper }}",
        "{{ m.content | lower }}",
        "{{ m.content | capitalize }}",
        "{{ m.content | replace('ß', 'ss') }}",
        "{{ m.content.split() | join(' ') }}",
        "{{ m.content | escape }}",
        "{{ m.content | tojson }}",
        "{{ m.content[:12] }}",
        "{{ m.content.encode('ascii', 'ignore').decode() }}",
        "{{ m.content.replace('  ', ' ') }}",
        "Bonjour",
    ],
)
def test_a_template_that_changes_letters_is_refused(changed: str) -> None:
    found = problem(CHATML.replace(CONTENT, changed))
    assert found is not None
    assert "changes the text of a turn of role user: 'Straße" in found
    only_replies = "{% if m.role == 'assistant' %}" + changed + "{% else %}{{ m.content }}{% endif %}"
    found = problem(CHATML.replace(CONTENT, only_replies))
    assert found is not None
    assert "role assistant" in found


def test_blanks_at_the_ends_of_a_turn_may_go() -> None:
    assert problem(CHATML.replace(CONTENT, "{{ m.content | trim }}")) is None


def test_a_second_bos_token_is_refused() -> None:
    twice = problem("{{ bos_token }}" + LLAMA3, "llama3")
    assert twice is not None
    assert twice.startswith("the chat template begins with '<s>' twice")


def test_the_folder_and_the_config_name_their_own_template(tmp_path: Path) -> None:
    def save(template: str, name: str) -> Path:
        tokenizer: Any = tokenizer_of(FAMILIES["chatml"], template)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    good, loud = save(CHATML, "good"), CHATML.replace(CONTENT, "{{ m.content | upper }}")
    with pytest.raises(CheckpointError, match=r"loud: the chat template changes the text .* set another chat_template"):
        load_tokenizer(save(loud, "loud"))
    (tmp_path / "loud.jinja").write_text(loud)
    with pytest.raises(ConfigError, match="chat_template: the chat template changes the text"):
        load_tokenizer(good, ChatTemplateConfig(path=str(tmp_path / "loud.jinja")))
