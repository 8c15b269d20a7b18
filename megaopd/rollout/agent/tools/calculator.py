"""A calculator with a parser of its own: no Python expression is ever evaluated.

Arithmetic is exact, on fractions; roots, fractional powers, pi and e have a float's digits. What an
expression can cost is bounded by its length, by the depth of its parentheses and by the size of
every intermediate value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

from megaopd.config import AgentConfig
from megaopd.rollout.agent.tools.tool import Tool, ToolError

MAX_LENGTH = 1000
MAX_DEPTH = 50
# Of numerator and denominator; below what a float can hold.
MAX_BITS = 1000
# Digits of a result that is no integer.
PRECISION = 12

# The exponent's three digits are what bounds a number before it is computed.
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?)"
    r"|(?P<name>[A-Za-z_]+)|(?P<sign>\*\*|//|[-+*/%^(),]))"
)


def evaluate(expression: str) -> str:
    """The value of an expression, as text.

    Knows + - * / // (floor division) % (its remainder) ** and ^ (powers), parentheses, pi, e, and
    the entries of `FUNCTIONS`.

    Raises:
        ToolError: it is no such expression, or too long, too deep or too large.
    """
    if len(expression) > MAX_LENGTH:
        raise ToolError(f"the expression has {len(expression)} characters, more than {MAX_LENGTH}")
    return _as_text(_Parser(_tokens(expression)).parse())


async def calculator(config: AgentConfig, *, expression: str) -> str:
    return evaluate(expression)


def _as_text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return format(float(value), f".{PRECISION}g")


def _tokens(expression: str) -> list[tuple[str, str]]:
    """(kind, text) of each token, and an end."""
    tokens, position, text = [], 0, expression.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            found = text[position:].strip()[:10]
            raise ToolError(f"cannot read the expression at {found!r}")
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    return [*tokens, ("end", "")]


def _bounded(value: Fraction) -> Fraction:
    """`value`, rounded to a float's precision where its fraction has become long."""
    if abs(value) >= 1 << MAX_BITS:
        raise ToolError("a number is out of range")
    if value.denominator.bit_length() > MAX_BITS:
        return Fraction(float(value))
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if base == 0 and exponent < 0:
        raise ToolError("division by zero")
    if exponent.denominator != 1:
        if base < 0:
            raise ToolError("a negative number to the power of a fraction")
        try:
            return _bounded(Fraction(float(base) ** float(exponent)))
        except OverflowError:
            raise ToolError("a number is out of range") from None
    if abs(base) in (0, 1):
        return base if exponent % 2 else abs(base) if exponent else Fraction(1)
    # A power has at least this many bits.
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if (size - 1) * abs(exponent) > MAX_BITS:
        raise ToolError("a number is out of range")
    return _bounded(base ** int(exponent))


def _square_root(value: Fraction) -> Fraction:
    if value < 0:
        raise ToolError("the square root of a negative number")
    top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if top * top == value.numerator and bottom * bottom == value.denominator:
        return Fraction(top, bottom)
    return Fraction(math.sqrt(value))


def _divide(a: Fraction, b: Fraction) -> Fraction:
    if b == 0:
        raise ToolError("division by zero")
    return a / b


def _modulo(a: Fraction, b: Fraction) -> Fraction:
    return a - b * math.floor(_divide(a, b))


OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _divide,
    "//": lambda a, b: Fraction(math.floor(_divide(a, b))),
    "%": _modulo,
}

# Name -> (number of arguments, at least 1; 0 is any number, function).
FUNCTIONS: dict[str, tuple[int, Callable[..., Fraction]]] = {
    "abs": (1, abs),
    "ceil": (1, lambda x: Fraction(math.ceil(x))),
    "floor": (1, lambda x: Fraction(math.floor(x))),
    "max": (0, max),
    "min": (0, min),
    "round": (1, lambda x: Fraction(round(x))),
    "sqrt": (1, _square_root),
}

CONSTANTS = {"pi": Fraction(math.pi), "e": Fraction(math.e)}


class _Parser:
    """Recursive descent; each method reads one rule of the grammar and returns its value.

    sum      = product {("+" | "-") product}
    product  = signed {("*" | "/" | "//" | "%") signed}
    signed   = ("+" | "-") signed | power
    power    = atom [("**" | "^") signed]
    atom     = number | constant | function "(" sum {"," sum} ")" | "(" sum ")"
    """

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0

    def parse(self) -> Fraction:
        value = self._sum()
        if self._next != "":
            raise ToolError(f"expected an operator or the end, found {self._next!r}")
        return value

    @property
    def _next(self) -> str:
        return self._tokens[self._position][1]

    def _take(self) -> tuple[str, str]:
        token = self._tokens[self._position]
        if token[0] == "end":
            raise ToolError("the expression ends too early")
        self._position += 1
        return token

    def _expect(self, sign: str) -> None:
        _, text = self._take()
        if text != sign:
            raise ToolError(f"expected {sign!r}, found {text!r}")

    def _sum(self) -> Fraction:
        return self._chain(("+", "-"), self._product)

    def _product(self) -> Fraction:
        return self._chain(("*", "/", "//", "%"), self._signed)

    def _chain(self, signs: tuple[str, ...], operand: Callable[[], Fraction]) -> Fraction:
        value = operand()
        while self._next in signs:
            _, sign = self._take()
            value = _bounded(OPERATORS[sign](value, operand()))
        return value

    def _signed(self) -> Fraction:
        # Every way down goes through here.
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ToolError(f"the expression is nested deeper than {MAX_DEPTH}")
        if self._next in ("+", "-"):
            _, sign = self._take()
            value = self._signed()
            value = -value if sign == "-" else value
        else:
            value = self._power()
        self._depth -= 1
        return value

    def _power(self) -> Fraction:
        base = self._atom()
        if self._next in ("**", "^"):
            self._take()
            return _power(base, self._signed())
        return base

    def _atom(self) -> Fraction:
        kind, text = self._take()
        if kind == "number":
            return _bounded(Fraction(text))
        if kind == "name" and text in CONSTANTS:
            return CONSTANTS[text]
        if kind == "name":
            return self._call(text)
        if text != "(":
            raise ToolError(f"expected a number, found {text!r}")
        value = self._sum()
        self._expect(")")
        return value

    def _call(self, name: str) -> Fraction:
        if name not in FUNCTIONS:
            known = ", ".join((*FUNCTIONS, *CONSTANTS))
            raise ToolError(f"there is no {name[:20]!r}; known are {known}")
        self._expect("(")
        arguments = [self._sum()]
        while self._next == ",":
            self._take()
            arguments.append(self._sum())
        self._expect(")")
        wanted, function = FUNCTIONS[name]
        if wanted and len(arguments) != wanted:
            raise ToolError(f"{name} takes {wanted} argument, found {len(arguments)}")
        return _bounded(function(*arguments))


CALCULATOR = Tool(
    description="Evaluates an arithmetic expression exactly, for example 12 * (3 + 4) ** 2.",
    parameters={
        "expression": {
            "type": "string",
            "description": f"numbers, + - * / // % **, parentheses, pi, e, {', '.join(FUNCTIONS)}",
        }
    },
    function=calculator,
)
