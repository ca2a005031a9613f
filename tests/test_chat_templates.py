"""Chat templates are programs of the model's: equal to transformers', and harmless when hostile."""

from __future__ import annotations

import copy

import pytest

from melens import chat, describe, locate
from melens.batches import prompts
from melens.chat import chat_ids, chat_start, chat_texts, render, template_of
from melens.errors import PromptError
from melens.exporting.prefix import fixed_first

MESSAGES = [
    {"role": "system", "content": 'be "brief" <b>'},
    {"role": "user", "content": "héllo \u2028 {{ 1 }}"},
    {"role": "assistant", "content": "ok"},
]
GOOD = {
    "plain": "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "namespace and dict": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
    "tools": "{% if tools is not none %}tools{% endif %}{% if not documents %}none{% endif %}",
    "trimmed blocks": "  {% if true %}\n  {{ eos_token }}\n  {% endif %}\n",
}
BAD = {
    "syntax": ("a\n{% if", r"line 2: "),
    "raise_exception": ("{{ raise_exception('only\nassistants') }}", "only assistants"),
    "undefined": ("{{ nothing.here }}", "'nothing' is undefined"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "private name": ("{% set ns = namespace(_x=1) %}", "takes no name like '_x'"),
    "memory": ("{{ 'a' * 10 ** 10 }}", "needs more than 512 MB"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "type": ("{{ 1 + 'a' }}", "TypeError"),
}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def made(tokenizer):
    return copy.deepcopy(tokenizer)


def test_a_good_template_gives_what_transformers_gives(made):
    for name, template in GOOD.items():
        made.chat_template = template
        for chat_ in (MESSAGES, MESSAGES[:1]):
            wanted = made.apply_chat_template(chat_, tokenize=False, add_generation_prompt=True)
            assert render(made, [chat_]) == (wanted,), name


def test_many_texts_are_one_process(made, monkeypatch):
    made.chat_template = "w5 {{ messages[0].content }}"
    calls = []
    run = chat.subprocess.run
    monkeypatch.setattr(chat.subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    texts = [f"w{i}" for i in range(6, 60)]
    assert chat_texts(made, texts) == tuple(f"w5 {text}" for text in texts)
    assert chat_ids(made, texts)[1] == [5, 7]
    assert chat_start(made) == 5
    assert len(calls) == 3  # the texts, again, and chat_start's own two
    many = [f"w{i}" for i in range(2 * chat.AT_ONCE + 1)]
    assert chat_texts(made, many) == tuple(f"w5 {text}" for text in many)
    assert len(calls) == 6  # the limits are of one part, however many texts there are


@pytest.mark.parametrize("name", BAD)
def test_a_bad_template_is_one_line(made, name):
    made.chat_template, says = BAD[name]
    with pytest.raises(PromptError, match=f"chat template cannot be used .*{says}") as said:
        chat_texts(made, ["w5"])
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 400


def test_what_failed_with_other_texts_is_tried_again(made):
    made.chat_template = "{{ messages[0].content if messages[0].content != 'b' else 1 + 'a' }}"
    with pytest.raises(PromptError, match="TypeError"):
        chat_texts(made, ["a", "b"])
    assert chat_texts(made, ["a"]) == ("a",)


def test_all_texts_together_have_a_limit(made, monkeypatch):
    made.chat_template = "{{ messages[0].content * 10 }}"
    monkeypatch.setattr(chat, "CHARACTERS", 45)
    monkeypatch.setattr(chat, "AT_ONCE", 2)
    assert len(chat_texts(made, list("abcd"))) == 4
    with pytest.raises(PromptError, match="more than 45 characters"):
        chat_texts(made, list("abcde"))


@pytest.mark.timeout(60)
def test_a_template_that_never_ends_is_stopped(made, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    made.chat_template = LOOP
    for _ in range(3):  # remembered: it costs its limit once
        with pytest.raises(PromptError, match=r"not done within 1 seconds|ended with code"):
            chat_texts(made, ["w5"])


def test_several_named_templates_have_a_default_or_are_refused(made):
    made.chat_template = {"default": "w5", "tool_use": "w6"}
    assert chat_texts(made, ["w7"]) == ("w5",)
    made.chat_template = {"rag": "w5", "tool_use": "w6"}
    with pytest.raises(PromptError, match="named rag, tool_use, and none named default"):
        template_of(made)
    made.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        template_of(made)


def test_nobody_meets_the_template_who_did_not_ask_for_a_chat(tiny, monkeypatch):
    tiny.tokenizer.chat_template = LOOP
    monkeypatch.setattr(chat, "_rendered", None)  # calling it would be a TypeError
    try:
        assert locate(tiny, ["w5 w6 w7 w8"])
        assert prompts("w5 w6").token_rows(tiny.tokenizer)
    finally:
        tiny.tokenizer.chat_template = None


def test_what_describes_a_token_goes_on_without_the_template(tiny):
    tiny.tokenizer.chat_template = "{{ raise_exception('assistants alone') }}"
    try:
        found = describe(tiny, prompts=["w5 w6 w7 w8"], first_tokens=2)
        with pytest.raises(PromptError, match="assistants alone"):
            locate(tiny, prompts(["w5 w6 w7 w8"], chat=True))
    finally:
        tiny.tokenizer.chat_template = None
    assert any("assistants alone" in line for line in found.missing)
    assert "chat template" not in [row.name for row in found.conditions]


def test_every_failure_says_how_to_do_without_the_template(made):
    for template in (None, {"tool": "a"}, 3, BAD["syntax"][0]):
        vars(made)["chat_template"] = template
        with pytest.raises(PromptError, match=r"--no-chat of generate and eval, no --chat elsewh"):
            chat_texts(made, ["w5"])
    made.chat_template = BAD["syntax"][0]
    with pytest.raises(PromptError, match=r"--no-chat.*--first-token"):
        fixed_first(made)
