"""Chat templates in the shape of known families, in few words, with a tiny tokenizer that has their tokens.

Each has what makes its family special: thinking that is cut from earlier turns, a generation prompt that begins the
thinking, no system role, a system turn that wanders to the last user turn, an end that is no end-of-sequence token.
"""

from dataclasses import dataclass, field
from typing import Any

CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- set parts = m.content.split('</think>') %}
        {%- set thought = parts[0].split('<think>')[-1].strip() if parts[1:] else '' %}
        {%- set said = parts[-1].strip() %}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
        {{- said }}
    {%- else %}{{- m.content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# A reply keeps its thinking, also when other turns follow, and is marked.
R1_TRAINING = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}{{- '<|Assistant|>' }}{% generation %}{{- m.content + eos_token }}{% endgeneration %}
    {%- elif m.role == 'user' %}{{- '<|User|>' + m.content }}
    {%- else %}{{- m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{% endif %}"""

R1 = (
    R1_TRAINING.replace("m.content + eos", "m.content.split('</think>')[-1] + eos")
    .replace("{% generation %}", "")
    .replace("{% endgeneration %}", "")
)

# Qwen3 of a kind that always thinks: the generation prompt begins the thinking, and the last reply has it too.
THINKING = (
    QWEN3[: QWEN3.index("    {%- if enable")].replace("assistant\\n' }}\n", "assistant\\n<think>\\n' }}\n")
    + "{%- endif %}"
)

GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (m.content | trim) }}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

# The system turn stands in the last user turn, so that it wanders as the conversation goes on.
MISTRAL = """\
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- set is_last = loop.last or (loop.index == turns | length - 1 and not add_generation_prompt) %}
        {{- '[INST] ' + (system if is_last else '') + m.content + '[/INST]' }}
    {%- else %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""

LLAMA3 = """\
{%- for m in messages %}
    {{- (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {{- (m.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

LLAMA4 = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|header_start|>' + m.role + '<|header_end|>\\n\\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{- m.content }}{% endgeneration %}
    {%- else %}{{- m.content }}{% endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"""

# The end-of-sequence token stands after the last turn only, and turns end with another one.
PHI = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and what is true of it.

    end: the token that ends a turn. eos: the tokenizer's end of sequence. has_system: whether it takes a system turn.
    thinks: every reply must begin with a thinking block. rewrites: a conversation of two turns is two samples.
    """

    template: str
    tokens: tuple[str, ...]
    end: str
    eos: str = "</s>"
    has_system: bool = True
    thinks: bool = False
    rewrites: bool = False
    marks: tuple[str, ...] = field(default=("<think>", "</think>"))


IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "chatml": Family(CHATML, IM, "<|im_end|>"),
    "qwen3": Family(QWEN3, IM, "<|im_end|>", eos="<|im_end|>", rewrites=True),
    "thinking": Family(THINKING, IM, "<|im_end|>", eos="<|im_end|>", thinks=True, rewrites=True),
    "r1": Family(R1_TRAINING, ("<|User|>", "<|Assistant|>"), "</s>", thinks=True),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", has_system=False),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]"), "</s>", rewrites=True),
    "llama3": Family(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "llama4": Family(LLAMA4, ("<|header_start|>", "<|header_end|>", "<|eot|>"), "<|eot|>"),
    "phi": Family(PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
}


def tokenizer_of(family: Family, template: str | None = None) -> Any:
    """A byte-level tokenizer with the family's tokens and its template, or another one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("<s>", "</s>", *family.tokens))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: at for at, token in enumerate([*special, *alphabet])}
    built: Any = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    built.add_tokens([AddedToken(token, normalized=False) for token in family.marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token=family.eos, chat_template=template or family.template
    )
