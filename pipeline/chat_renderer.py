"""The process that renders chat templates: whatever a template does, it happens here and ends after a second or two.

A line of JSON comes in on standard input and one goes out on standard output. First {"template", "tokens"}, answered by {} or {"error"};
then {"messages"}, answered by {"text"} or {"error"}. Templates are rendered as Hugging Face's `apply_chat_template` does, but for the
time of day, which would make a text depend on when it was made.
"""

import json
import resource
import signal
import sys
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_S = 2.0  # of the processor: a busy machine makes no template endless
MEMORY_BYTES = 1 << 30
MOST_CHARACTERS = 4 << 20


class Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is only rendered."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole process group; who asked decides when this stops
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also in the middle of one long operation
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    template: Any = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, RENDER_S)
        try:
            if template is None:
                template, answer = _compile(request["template"], request["tokens"]), {}
            else:
                answer = {"text": _render(template, request["messages"])}
        except MemoryError:
            answer = {"error": "it needs more memory than a template may have"}
        except RecursionError:
            answer = {"error": "it calls itself too deeply"}
        except Exception as error:  # of the template's making, whatever it is
            answer = {"error": " ".join(f"{error}".split())[:300] or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _compile(source: str, tokens: dict[str, Any]) -> Any:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(tokens, raise_exception=raise_exception)
    return environment.from_string(source)


def _render(template: Any, messages: list[dict[str, str]]) -> str:
    text = template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it makes {len(text)} characters of these messages, {MOST_CHARACTERS} is the most")
    return text


if __name__ == "__main__":
    main()
