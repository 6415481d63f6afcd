"""A chat template as a formula: run once on stand-ins, then filled in for any question and language.

Running a template per rollout costs as much as tokenising it, and a text in which only the tag differs need not be
written again. A template is a program, though: it may trim, cut or look into what it is given. So it is run on a
stand-in, a string that knows where it came from but not what it says:

- joining and trimming stand-ins gives stand-ins; what comes out is a `Formula`, literals and fields in order;
- a question with a plain answer (`startswith`, `in`, `==`, a length) is answered for an example and noted with the
  answer. The formula holds for every prompt that gives the same answers, because for those the program takes the same
  path;
- anything else (a slice, `replace`, `tojson`, an unknown function) ends the attempt: there is no formula, and the
  template is run for every prompt.

The date, where a template writes it, is that of the tracing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import nodes
from jinja2.environment import Environment, Template
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, REQUEST = "question", "request"
"""The fields: the question, and what asks for the language (tag or system prompt). A request is never empty and neither
begins nor ends with white space, so trimming stops at it."""

Message = dict[str, str]


class Untraceable(Exception):
    """The template does something with its input that a formula cannot say."""


@dataclass(frozen=True)
class Field:
    """The place of a prompt's own text."""

    name: str


@dataclass(frozen=True)
class Trimmed:
    """Text without white space at one end; `method` is lstrip or rstrip."""

    parts: tuple[Part, ...]
    method: str


Part: TypeAlias = "str | Field | Trimmed"
Parts: TypeAlias = tuple[Part, ...]


def fill(parts: Iterable[Part], values: Mapping[str, str]) -> str:
    """The text of `parts` with the fields' values."""
    return "".join(
        part
        if isinstance(part, str)
        else values[part.name]
        if isinstance(part, Field)
        else getattr(fill(part.parts, values), part.method)()
        for part in parts
    )


def fields(part: Part) -> set[str]:
    """The names of the fields in `part`."""
    if isinstance(part, Trimmed):
        return set().union(*map(fields, part.parts))
    return {part.name} if isinstance(part, Field) else set()


@dataclass(frozen=True)
class Condition:
    """What the template asked about its input, and the answer that its path depends on."""

    parts: Parts
    question: Callable[..., Any]
    arguments: tuple[Any, ...]
    answer: Any

    def holds(self, values: Mapping[str, str]) -> bool:
        """Whether the prompt of `values` gives the same answer."""
        return self.question(fill(self.parts, values), *self.arguments) == self.answer


@dataclass(frozen=True)
class Formula:
    """The template's text for every prompt that meets the conditions."""

    parts: Parts
    conditions: tuple[Condition, ...]

    def holds(self, values: Mapping[str, str]) -> bool:
        return all(condition.holds(values) for condition in self.conditions)


def trace(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    messages: Callable[[str, str], Sequence[Message]],
    example: tuple[str, str],
) -> Formula | None:
    """The formula of a chat template, None where it has none.

    `template`: Jinja source, None for the tokenizer's own. `messages(question, request)`: the chat, built by joining
    its arguments and literals only. `example`: a question and a request.
    """
    values = dict(zip((QUESTION, REQUEST), example))
    tracer = _Tracer(values)
    try:
        compiled = _compiled(tokenizer.get_chat_template(template))
        output = compiled.render(
            messages=messages(tracer.text(Field(QUESTION)), tracer.text(Field(REQUEST))),
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **tokenizer.special_tokens_map,
        )
        formula = Formula(_merged(tracer.parts_of(output)), tuple(dict.fromkeys(tracer.conditions)))
    except Exception:  # A template may fail in any way on a stand-in; then it is run on the text itself.
        return None
    written = tokenizer.apply_chat_template(
        messages(*example), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return formula if fill(formula.parts, values) == written else None


def _merged(parts: Parts) -> Parts:
    """`parts` with neighbouring literals joined."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


# --- the stand-ins ------------------------------------------------------------------------------------------------


class _Tracer:
    """Makes stand-ins and notes what is asked about them."""

    def __init__(self, example: Mapping[str, str]) -> None:
        self._example = example
        self.conditions: list[Condition] = []

    def text(self, *parts: Part) -> _StandIn:
        stand_in = _StandIn(_NONSENSE)
        stand_in.tracer, stand_in.parts = self, parts
        return stand_in

    def parts_of(self, text: str) -> Parts:
        """The parts of a stand-in or plain string."""
        if isinstance(text, _StandIn):
            return text.parts
        if _NONSENSE in text:
            raise Untraceable("a stand-in became plain text")
        return (text,) if text else ()

    def ask(self, text: _StandIn, question: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """The example's answer, noted."""
        if _holds_stand_in(arguments):
            raise Untraceable("a stand-in compared with a stand-in")
        answer = question(fill(text.parts, self._example), *arguments)
        self.conditions.append(Condition(text.parts, question, arguments, answer))
        return answer


# What a stand-in says where Python itself reads it; a template's output must not have it.
_NONSENSE = "\ue000stand-in\ue001"


class _StandIn(str):
    """Text of which only the parts are known; see the module's docstring."""

    tracer: _Tracer
    parts: Parts

    def __add__(self, other: str) -> _StandIn:
        return self.tracer.text(*self.parts, *self.tracer.parts_of(_string(other)))

    def __radd__(self, other: str) -> _StandIn:
        return self.tracer.text(*self.tracer.parts_of(_string(other)), *self.parts)

    def __str__(self) -> _StandIn:
        return self

    def lstrip(self, characters: None = None) -> _StandIn:
        _only_white_space(characters)
        return self.tracer.text(*_trim_left(self.parts))

    def rstrip(self, characters: None = None) -> _StandIn:
        _only_white_space(characters)
        return self.tracer.text(*_trim_right(self.parts))

    def strip(self, characters: None = None) -> _StandIn:
        return self.lstrip(characters).rstrip()

    def __bool__(self) -> bool:
        return self.tracer.ask(self, bool, ())


def _string(other: object) -> str:
    if not isinstance(other, str):
        raise Untraceable("a stand-in joined with something that is no text")
    return other


def _only_white_space(characters: object) -> None:
    if characters is not None:
        raise Untraceable("characters other than white space are trimmed")


def _asks(question: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *arguments: self.tracer.ask(self, question, arguments)


def _refuses(name: str) -> Callable[..., Any]:
    def refuse(*arguments: object, **named: object) -> Any:
        raise Untraceable(f"str.{name}")

    return refuse


_ASKED = (
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __contains__ __len__ startswith endswith find rfind index rindex count "
    "isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper"
).split()
_OF_EVERY_OBJECT = (
    "__new__ __init__ __class__ __dict__ __doc__ __module__ __getattribute__ __setattr__ __delattr__ __dir__ "
    "__init_subclass__ __subclasshook__ __sizeof__"
).split()
for _name in _ASKED:
    setattr(_StandIn, _name, _asks(getattr(str, _name)))
for _name in set(dir(str)) - set(_ASKED) - set(_OF_EVERY_OBJECT) - set(vars(_StandIn)) | {"__hash__"}:
    setattr(_StandIn, _name, _refuses(_name))


def _solid(part: Part) -> bool:
    """Whether trimming stops at `part`, whatever the question."""
    return part == Field(REQUEST) or (isinstance(part, str) and bool(part.strip()))


def _trim_left(parts: Parts) -> Parts:
    first = next((i for i, part in enumerate(parts) if _solid(part)), len(parts))
    # A literal may begin with white space of its own; a request does not.
    end = first + (first < len(parts) and isinstance(parts[first], str))
    return _trim(parts[:end], "lstrip") + parts[end:]


def _trim_right(parts: Parts) -> Parts:
    last = next((i for i in reversed(range(len(parts))) if _solid(parts[i])), -1)
    start = last + (last < 0 or not isinstance(parts[last], str))
    return parts[:start] + _trim(parts[start:], "rstrip")


def _trim(parts: Parts, method: str) -> Parts:
    if not set().union(*map(fields, parts)):
        text = getattr(fill(parts, {}), method)()
        return (text,) if text else ()
    return (Trimmed(parts, method),)


def _holds_stand_in(value: object) -> bool:
    """Whether a stand-in may be inside `value`; yes for what cannot be looked into."""
    if isinstance(value, _StandIn):
        return True
    if isinstance(value, (list, tuple, set)):
        return any(map(_holds_stand_in, value))
    if isinstance(value, dict):
        return any(map(_holds_stand_in, value.values()))
    plain = (str, int, float, type(None), Undefined, Macro, Environment, Context, EvalContext)
    return not isinstance(value, plain)


# --- Jinja on stand-ins -------------------------------------------------------------------------------------------

_HARMLESS_FILTERS = (
    "trim string length count default d first last list items reverse selectattr rejectattr select reject map"
).split()
"""They do nothing to a string but what the stand-in itself allows, refuses or notes."""


class _TracingEnvironment(ImmutableSandboxedEnvironment):
    """Jinja, except that text is joined by `+` alone and no stand-in gets into functions that would read it."""

    intercepted_binops = frozenset({"%"})

    @classmethod
    def like(cls, environment: Environment) -> _TracingEnvironment:
        """With the settings, extensions, filters and functions of `environment`."""
        tracing = cls.__new__(cls)
        tracing.__dict__.update(environment.__dict__)
        tracing.filters = {
            name: function if name in _HARMLESS_FILTERS else _guarded(function)
            for name, function in environment.filters.items()
        }
        return tracing

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        return functools.reduce(lambda text, piece: text + piece, pieces, "")

    def call(self, context: Context, function: Any, /, *arguments: Any, **named: Any) -> Any:
        carries = isinstance(function, Macro) or function in (Namespace, dict)
        if not carries and _holds_stand_in([*arguments, *named.values()]):
            raise Untraceable(f"a call of {function!r}")
        return super().call(context, function, *arguments, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _holds_stand_in([left, right]):
            raise Untraceable(f"operator {operator}")
        return super().call_binop(context, operator, left, right)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        if _holds_stand_in([*arguments, *named.values()]):
            raise Untraceable(f"filter {function!r}")
        return function(*arguments, **named)

    return guarded


class _PlusForTilde(NodeTransformer):
    """`a ~ b` as `a|string + b|string`: the same text, but joined where stand-ins see it."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802 (Jinja's name)
        strings = [nodes.Filter(self.visit(part), "string", [], [], None, None) for part in node.nodes]
        joined = functools.reduce(nodes.Add, strings)
        return joined.set_lineno(node.lineno).set_environment(node.environment)


def _compiled(source: str) -> Template:
    """The template for stand-ins, otherwise as the tokenizer compiles it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _TracingEnvironment.like(_compile_jinja_template(source).environment)
    tree = _PlusForTilde().visit(environment.parse(source))
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
