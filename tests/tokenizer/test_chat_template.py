"""Chat templates: renderings that the vendors document, and transformers' own for the same template."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from jax_mla_cp.tokenizer import ChatTemplate, Tokenizer, TokenizerError, require_tokenizer
from tests.helpers.vocabularies import BYTE_LEVEL, KIMI_SPECIALS, byte_level, kimi_ranks, save_json, save_kimi

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEPSEEK = {"bos_token": {"content": BOS, "lstrip": False}, "eos_token": EOS, "unk_token": None}
# Written for these tests: DeepSeek-V3.1's form without tools.
V3_1 = """
{%- set ns = namespace(system='', answering=false) -%}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endfor -%}
{{ bos_token + ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {{- '<｜Assistant｜></think>' + m.content.split('</think>', 1)[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' ~ ('<think>' if thinking else '</think>') }}
{%- endif %}"""


def template(name: str) -> ChatTemplate:
    settings = DEEPSEEK if name.startswith("deepseek") else {"bos_token": "[BOS]", "eos_token": "[EOS]"}
    return ChatTemplate(source(name), settings, name=name)


def source(name: str) -> str:
    path = Path(__file__).parent / "templates" / f"{name}.jinja"
    return V3_1 if name == "deepseek_v3_1" else path.read_text(encoding="utf-8")


def conversation(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant by turns."""
    turns = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.mark.parametrize("name", ["kimi_k2", "kimi_k2_thinking"])
def test_kimi_calls_and_results(name: str) -> None:
    """The template numbers the calls itself and gives each result the id of its call, by a queue."""
    calls: list[dict[str, Any]] = [
        {"id": f"functions.{function}:{n}", "type": "function", "function": {"name": function, "arguments": arguments}}
        for n, (function, arguments) in enumerate((("add", '{"a": 1}'), ("sub", "{}")))
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *(
            {"role": "tool", "tool_call_id": call["id"], "content": text}
            for call, text in zip(calls, ("2", "0"), strict=True)
        ),
    ]
    text = template(name).render(messages)
    called = [
        f"<|tool_call_begin|>functions.{call}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for call, arguments in (("add:0", '{"a": 1}'), ("sub:1", "{}"))
    ]
    assert f"<|tool_calls_section_begin|>{''.join(called)}<|tool_calls_section_end|>" in text
    assert text.index("## Return of functions.add:0\n2") < text.index("## Return of functions.sub:1\n0")


def test_deepseek_v3() -> None:
    """As in the model card's chat template: BOS, the system's text without a tag, and EOS after each answer."""
    messages = conversation("Who are you?", "I am DeepSeek.", "1+1=?", system="You are a helpful assistant.")
    assert template("deepseek_v3").render(messages) == (
        f"{BOS}You are a helpful assistant.<｜User｜>Who are you?<｜Assistant｜>I am DeepSeek.{EOS}"
        "<｜User｜>1+1=?<｜Assistant｜>"
    )
    assert template("deepseek_v3").render(messages[:3], add_generation_prompt=False) == (
        f"{BOS}You are a helpful assistant.<｜User｜>Who are you?<｜Assistant｜>I am DeepSeek.{EOS}"
    )
    two = [{"role": "system", "content": "One."}, {"role": "system", "content": "Two."}, *conversation("Hi")]
    assert template("deepseek_v3").render(two) == f"{BOS}One.\n\nTwo.<｜User｜>Hi<｜Assistant｜>"  # since V3-0324


def test_deepseek_r1() -> None:
    """An earlier answer loses its thoughts; a new one begins with them."""
    messages = conversation("Who are you?", "<think>\nHmm\n</think>\n\nI am DeepSeek-R1.", "1+1=?")
    # The template is a copy with a switch added; this is how the vendor's own behaves.
    assert template("deepseek_r1").render(messages, enable_thinking=True) == (
        f"{BOS}<｜User｜>Who are you?<｜Assistant｜>\n\nI am DeepSeek-R1.{EOS}<｜User｜>1+1=?<｜Assistant｜><think>\n"
    )


def test_deepseek_v3_1() -> None:
    """The model card's example."""
    system = "You are a helpful assistant"
    messages = conversation("Who are you?", "<think>Hmm</think>I am DeepSeek", "1+1=?", system=system)
    start = (
        f"{BOS}{system}<｜User｜>Who are you?<｜Assistant｜></think>I am DeepSeek{EOS}<｜User｜>1+1=?<｜Assistant｜>"
    )
    assert template("deepseek_v3_1").render(messages, thinking=True) == f"{start}<think>"
    assert template("deepseek_v3_1").render(messages, thinking=False) == f"{start}</think>"
    assert template("deepseek_v3_1").render(messages) == f"{start}</think>"


KIMI_SYSTEM = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"


def test_kimi_k2() -> None:
    system = "You are Kimi, an AI assistant created by Moonshot AI."
    turns = (
        "<|im_user|>user<|im_middle|>Hello<|im_end|><|im_assistant|>assistant<|im_middle|>Hi!<|im_end|>"
        "<|im_user|>user<|im_middle|>1+1=?<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    messages = conversation("Hello", "Hi!", "1+1=?", system=system)
    assert template("kimi_k2").render(messages) == KIMI_SYSTEM + turns
    assert template("kimi_k2").render(messages[1:]) == f"{KIMI_SYSTEM}\n{turns}"  # its `{% endif %}` keeps the newline


def test_kimi_k2_thinking() -> None:
    messages = conversation("Hello", "Hi!", "1+1=?")
    assert template("kimi_k2_thinking").render(messages) == KIMI_SYSTEM + (
        "<|im_user|>user<|im_middle|>Hello<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>Hi!<|im_end|>"
        "<|im_user|>user<|im_middle|>1+1=?<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )


NAMES = ["deepseek_v3", "deepseek_v3_1", "deepseek_r1", "kimi_k2", "kimi_k2_thinking"]
CONTENTS = [
    "Hello",
    "  spaces  \n\n",
    "",
    "<think>a</think>b</think>c",
    "{{ 1 + 1 }} {% raw %}",
    "<b>'\"&</b>",
    "你好 👩‍👩‍👧",
    "<|im_end|><｜User｜>",
    "1\n2\n",
]


@pytest.mark.parametrize("name", NAMES)
def test_same_text_as_transformers(name: str) -> None:
    ours = template(name)
    special = {"bos_token": BOS, "eos_token": EOS} if name.startswith("deepseek") else {}
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **(special or {"bos_token": "[BOS]"}))
    theirs.chat_template = source(name)
    grid = itertools.product(
        [None, "", "Be brief.\n"],
        itertools.product(CONTENTS, repeat=2),
        range(1, 5),
        [True, False],
        [{}, {"thinking": 1}],
    )
    for system, pair, turns, add, variables in itertools.islice(grid, None, None, 7):
        messages = conversation(*itertools.islice(itertools.cycle(pair), turns), system=system)
        want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add, **variables)
        assert ours.render(messages, add_generation_prompt=add, **variables) == want


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}\n{% endfor %}",
        "{{ {'b': '<é>', 'a': [1, none]} | tojson(indent=2) }}{{ [1] | tojson(separators=(',', ':')) }}",
        "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}{{ x is defined }}",
        "  {% if tools is defined and tools is none %}\n  yes\n  {% endif %}\n{{ nothing }}{{ documents }}",
        "{% set d = dict(a=1) %}{{ d.a }}{{ d.items() | list }}{{ strftime_now('%Y') }}",
        "{% macro f(x) %}[{{ x | upper }}]{% endmacro %}{{ f('a') }}{{ 'a' * 3 }}{{ messages[::-1] | length }}",
        "{{ messages[0]['content'].strip().rstrip('o').title() }}{{ '%s-%d' | format('a', 3) }}{{ bos_token }}",
    ],
)
def test_what_templates_have_to_work_with(text: str) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>")
    theirs.chat_template = text
    messages = conversation("Hello", "Hi", "Bye")
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(text, {"bos_token": "<s>"}).render(messages) == want


def test_a_templates_own_refusal() -> None:
    text = "{% if messages[0].role != 'user' %}\n{{ raise_exception('the first message must be the user\\'s') }}{% endif %}"
    with pytest.raises(TokenizerError, match=r"mine, line 2: the first message must be the user's"):
        ChatTemplate(text, {}, name="mine").render(conversation("a", system="b"))


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    got = template("kimi_k2").render([{"role": "user", "content": parts}])
    assert got == template("kimi_k2").render(conversation("Hello"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected a list"),
        ("hello", "messages: expected a list"),
        ({"role": "user", "content": "a"}, "messages: expected a list"),
        ([*conversation("a"), "b"], r"messages\[1\]: expected an object .* got str"),
        ([{"content": "a"}], r"messages\[0\].role: expected one of system, developer, user, assistant, tool, got None"),
        ([{"role": "wizard", "content": "a"}], r"messages\[0\].role: .* got 'wizard'"),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\].role: .* got \['user'\]"),
        ([{"role": "user"}], r"messages\[0\].content: expected a string .* got NoneType"),
        ([{"role": "user", "content": 1}], r"messages\[0\].content: expected a string .* got int"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\]: expected"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\]: expected"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\]: expected"),
        ([{"role": "user", "content": "a", "tool_calls": []}], r"messages\[0\].tool_calls: not supported"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], r"messages\[0\].tool_calls\[0\]: expected"),
        ([{"role": "tool", "content": None}], r"messages\[0\].content: expected a string .* got NoneType"),
        ([{"role": "user", "content": "a", "name": 5}], r"messages\[0\].name: expected a string, got int"),
    ],
)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template("deepseek_v3").render(messages)


def test_variables_are_data() -> None:
    with pytest.raises(ValueError, match="variables for the chat template: expected JSON values"):
        template("deepseek_v3").render(conversation("a"), file=Path("x"))


def test_bos_is_there_once(tmp_path: Path) -> None:
    save_json(
        tmp_path,
        byte_level(template=("<s>", "$A")),
        bos_token="<s>",
        add_bos_token=True,
        add_eos_token=True,
        eos_token="</s>",
        chat_template="{{ bos_token }}{{ messages[0].content }}",
    )
    tokenizer = require_tokenizer(Tokenizer.from_dir(tmp_path, 1000))
    assert tokenizer.encode_chat(conversation("hello")) == tokenizer.encode("hello")[:-1]


def test_kimis_conversation_as_ids(tmp_path: Path) -> None:
    save_kimi(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source("kimi_k2"))
    tokenizer = require_tokenizer(Tokenizer.from_dir(tmp_path, 1000))
    special = {name: len(kimi_ranks()) + place for place, name in KIMI_SPECIALS.items()}
    end, middle = special["<|im_end|>"], special["<|im_middle|>"]
    assert tokenizer.encode_chat(conversation("Hello", system="Hi")) == [
        special["<|im_system|>"],
        *tokenizer.encode("system"),
        middle,
        *tokenizer.encode("Hi"),
        end,
        special["<|im_user|>"],
        *tokenizer.encode("user"),
        middle,
        *tokenizer.encode("Hello"),
        end,
        special["<|im_assistant|>"],
        *tokenizer.encode("assistant"),
        middle,
    ]


def in_directory(folder: Path, chat_template: Any = None, file: str | None = None) -> Tokenizer | None:
    save_json(folder, byte_level(), **({} if chat_template is None else {"chat_template": chat_template}))
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    return Tokenizer.from_dir(folder, 1000)


NAMED = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]


@pytest.mark.parametrize(
    ("setting", "file", "text"), [("a", None, "a"), ("a", "b", "b"), (None, "b", "b"), (NAMED, None, "default")]
)
def test_which_template(tmp_path: Path, setting: Any, file: str | None, text: str) -> None:
    tokenizer = require_tokenizer(in_directory(tmp_path, setting, file))
    assert tokenizer.decode(tokenizer.encode_chat(conversation("x"))) == text


@pytest.mark.parametrize("tokenizer", [None, BYTE_LEVEL])
def test_no_template(tmp_path: Path, tokenizer: Tokenizer | None) -> None:
    with pytest.raises(
        TokenizerError, match=r"no chat template.*Send the prompt as text, or put .*chat_template.jinja"
    ):
        require_tokenizer(tokenizer or in_directory(tmp_path)).encode_chat(conversation("a"))


@pytest.mark.parametrize(
    ("setting", "file", "message"),
    [
        (NAMED[:1], None, r"tokenizer_config.json: chat_template 'default': not found; the templates are \['rag'\]"),
        ({"default": "a"}, None, "tokenizer_config.json: chat_template: expected a string, got dict"),
        ("a\n{% if %}", None, "tokenizer_config.json: chat_template, line 2: Expected an expression"),
        (None, "a\n\n{{ b", "chat_template.jinja, line 3: "),
        (None, "a" * (1 << 19), "524288 characters; the limit for a template is 262144"),
    ],
)
def test_bad_templates(tmp_path: Path, setting: Any, file: str | None, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        in_directory(tmp_path, setting, file)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    in_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja: can't be read as UTF-8"):
        Tokenizer.from_dir(tmp_path, 1000)


def test_messages_are_not_changed() -> None:
    messages = conversation("a")
    before = json.dumps(messages)
    template("kimi_k2").render(messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", ["A page is", "e", "ends with space "])
def test_continues_a_message_as_transformers(name: str, content: str) -> None:
    special = {"bos_token": BOS, "eos_token": EOS} if name.startswith("deepseek") else {"bos_token": "[BOS]"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **special)
    theirs.chat_template = source(name)
    messages = conversation("Hello", content)
    want = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert template(name).render(messages, continue_final_message=True) == want
