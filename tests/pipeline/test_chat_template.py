"""Templates are rendered as Hugging Face renders them, and whatever one does ends soon and stays in its process."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inflash.errors import InflashError
from inflash.pipeline import chat_renderer, chat_template
from inflash.pipeline.chat_template import MOST_ENDLESS, ChatTemplate, ChatTemplateError, load_chat_template

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
CHATML = r"""{% for message in messages %}
    {% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' -}}
{% endif %}
"""


@pytest.fixture
def opened() -> Iterator[Any]:
    made: list[ChatTemplate] = []

    def make(source: str, **tokens: str) -> ChatTemplate:
        made.append(ChatTemplate(source, tokens, "chat.jinja"))
        return made[-1]

    yield make
    for template in made:
        template.close()
        template.close()


def test_what_is_usual_in_templates_works(opened) -> None:
    assert opened(CHATML).render(MESSAGES) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    source = """\
{{ bos_token }}{% for m in messages %}
  {% if m.role == 'system' %}{% continue %}{% endif %}
{% generation %}[{{ m['content'] | trim }}]{% endgeneration %}
{% break %}
{% endfor %}
{{ messages[0] | tojson }}{{ tools is none }}{{ eos_token }}{{ nothing }}{{ {'a': 'ü<'} | tojson(indent=1) }}"""
    text = opened(source, bos_token="<s>", eos_token="</s>").render([*MESSAGES, {"role": "user", "content": "{{ 7 * 7 }}"}])
    assert text == '<s>[Hi]{"role": "system", "content": "Be brief."}True</s>{\n "a": "ü<"\n}'


def test_messages_are_data_and_never_a_template(opened) -> None:
    attack = "{{ messages.append(1) }}{% for x in range(9) %}x{% endfor %}{{ ''.__class__ }}"
    assert opened("{{ messages[0].content }}").render([{"role": "user", "content": attack}]) == attack


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "refuses these messages: Roles must alternate$"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses .*unsafe"),
        ("{{ messages.append(1) }}", "refuses .*(unsafe|not safely callable)"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "refuses .*unsafe"),
        ("{{ messages[0].nothing.more }}", "refuses .*undefined|has no attribute"),
        ("{{ strftime_now('%Y') }}", "refuses .*'strftime_now' is undefined"),
        ("{{ 'a' * 10 ** 10 }}", "refuses .*more memory"),
        ("{{ 'a' * 5000000 }}", "refuses .*5000000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses .*calls itself too deeply"),
        ("{% include '/etc/passwd' %}", "refuses .*no loader"),
    ],
)
def test_a_template_may_refuse_and_may_not_reach_out(opened, source: str, reason: str) -> None:
    with pytest.raises(InflashError, match=rf"^chat.jinja: the chat template {reason}") as caught:
        opened(source).render(MESSAGES)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, ChatTemplateError)


@pytest.mark.parametrize("source", ["{% for m in messages %}", "{{ messages", "{% nonsense %}", "{{ 'a' | nonsense }}"])
def test_a_broken_template_is_of_no_use(opened, source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"^chat.jinja: the chat template is broken: .*; correct it$"):
        opened(source).render(MESSAGES)


def test_an_endless_template_is_stopped_and_in_the_end_given_up(opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In jinja2's own loops, and in one operation of C that no exception can interrupt."""
    (tmp_path / "impatient.py").write_text(
        "from inflash.pipeline import chat_renderer\nchat_renderer.RENDER_S = 0.3\nchat_renderer.main()\n"
    )
    monkeypatch.setattr(
        chat_template, "RENDERER", (sys.executable, "-P", "-c", f"exec(open({str(tmp_path / 'impatient.py')!r}).read())")
    )
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = opened("{% if messages[0].content == 'loop' %}" + endless + "{% elif messages[0].content == 'power' %}"
                      "{{ 7 ** (7 ** (9 * messages|length)) }}{% else %}good{% endif %}")  # fmt: skip
    for content in ("loop", "power"):
        with pytest.raises(InflashError, match="does not end on these messages; it was stopped"):
            template.render([{"role": "user", "content": content}])
    assert template.render(MESSAGES) == "good"
    began = time.monotonic()
    for _ in range(MOST_ENDLESS):
        with pytest.raises(InflashError, match="does not end on these"):
            template.render([{"role": "user", "content": "power"}])
    assert time.monotonic() - began < 60
    with pytest.raises(ChatTemplateError, match="did not end, 3 times in a row"):
        template.render(MESSAGES)
    with pytest.raises(ChatTemplateError, match="cannot be compiled in time"):
        opened("{{ 7 ** (7 ** 9) }}").render(MESSAGES)
    assert chat_renderer.RENDER_S == 2.0


def test_a_dead_process_is_noticed_and_replaced(opened) -> None:
    template = opened(CHATML)
    template.render(MESSAGES)
    os.kill(template._process.pid, 9)
    template._process.wait(10)
    with pytest.raises(InflashError, match="it was stopped"):
        template.render(MESSAGES)
    assert template.render(MESSAGES).endswith("assistant\n")


def test_a_process_that_takes_nothing_is_given_up(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template larger than a pipe holds, for a process that does not read."""
    monkeypatch.setattr(chat_template, "RENDERER", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(chat_template, "_START_S", 0.5)
    began = time.monotonic()
    with pytest.raises(ChatTemplateError, match="cannot be compiled in time"):
        opened("{# " + "x" * (1 << 20) + " #}").render(MESSAGES)
    assert time.monotonic() - began < 20


def folder_with(folder: Path, config: Any = None, template: str | bytes | None = None) -> Path:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
    return folder


@pytest.mark.parametrize(
    ("config", "template", "text"),
    [
        ({"chat_template": "a{{ bos_token }}", "bos_token": "<s>"}, None, "a<s>"),
        ({"chat_template": "a", "bos_token": {"content": "<s>"}}, "b{{ bos_token }}", "b<s>"),
        ({"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "c"}]}, None, "c"),
        (None, "d{{ bos_token is defined }}", "dFalse"),
    ],
)
def test_the_template_is_where_hugging_face_keeps_it(tmp_path: Path, config: Any, template: Any, text: str) -> None:
    loaded = load_chat_template(folder_with(tmp_path, config, template))
    try:
        assert loaded.render(MESSAGES) == text
    finally:
        loaded.close()


@pytest.mark.parametrize(
    ("config", "template", "reason"),
    [
        (None, None, "this model has no chat template, so it takes no messages"),
        ({}, None, "this model has no chat template"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, None, "this model has no chat template"),
        ({"chat_template": 3}, None, "chat_template should be a text, found int"),
        ("[]", None, "expected a JSON object, found list"),
        ("{", None, "expected JSON"),
        (None, b"\xff", "cannot be read as UTF-8 text"),
    ],
)
def test_a_model_without_a_sound_template_says_so(tmp_path: Path, config: Any, template: Any, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason):
        load_chat_template(folder_with(tmp_path, config, template))
