r"""The data sets that `tools/prepare_data.py` knows: what their rows look like, what is asked.

A new one is an entry of `SOURCES`: a function from a row to an `Example`, and the name of the
instruction that its problems come with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megaopd.data.answers import hash_number, last_boxed
from megaopd.data.rows import Row, excerpt

Message = dict[str, str]

# How a problem is asked, by name; the data sets' own wording where they have one.
INSTRUCTIONS: dict[str, str] = {
    "none": "{problem}",
    "boxed": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    # As verl asks for GSM8K's answers.
    "hash": '{problem} Let\'s think step by step and output the final answer after "####".',
    # The prompts of DAPO-Math-17k, to the letter.
    "answer_line": (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\n{problem}\n\nRemember to put your answer on its own line after "Answer:".'
    ),
    "tags": (
        "{problem}\n\nThink first, then give the final answer alone between <answer> and </answer>."
    ),
}


@dataclass(frozen=True)
class Example:
    """One row of a data set, understood.

    Attributes:
        problem: the problem without an instruction, or a conversation that ends before the answer.
        answer: the reference answer, None where the row has none.
        example_id: the row's own name, if it has one.
        data_source: the row's own word on where it comes from, if it has one.
        response: a whole response, with its reasoning, if the row has one.
    """

    problem: str | list[Message]
    answer: str | None
    example_id: str | None = None
    data_source: str | None = None
    response: str | None = None


@dataclass(frozen=True)
class Columns:
    """Columns that the command line names in place of a source's own; empty leaves the choice to
    the source."""

    prompt: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Source:
    """A kind of data set.

    Attributes:
        about: a line for people: what it is.
        layouts: the layouts that are read, each one as (where it is found, its columns).
        instruction: the entry of `INSTRUCTIONS` that its problems come with.
        convert: row -> example; a `DataError` says what is wrong with the row.
        num_problems: how many a complete one has, None where that varies.
    """

    about: str
    layouts: tuple[tuple[str, str], ...]
    instruction: str
    convert: Callable[[Row, Columns], Example]
    num_problems: int | None = None


def ask(problem: str, instruction: str) -> str:
    """The problem as the model is asked it."""
    return INSTRUCTIONS[instruction].replace("{problem}", problem)


def bare(text: str) -> str:
    """The problem in a prompt, without the instruction around it where that is one of ours."""
    for instruction in INSTRUCTIONS.values():
        before, _, after = instruction.partition("{problem}")
        longer = len(text) > len(before) + len(after) > 0
        if longer and text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)]
    return text


def text(row: Row, *columns: str) -> str:
    """The text in the first of the columns that the row has, without blanks around it.

    Raises:
        DataError: it has none of them, or something else is in it.
    """
    column = _first(row, columns)
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise row.error(f"column {column!r} holds {excerpt(value)}", "expected text")
    return str(value).strip()


def _first(row: Row, columns: tuple[str, ...]) -> str:
    for column in columns:
        if row.has(column):
            return column
    others = f", nor {' or '.join(columns[1:])}" if columns[1:] else ""
    raise row.missing(columns[0], "see the layouts in --help, or name the column", others)


def _example_id(row: Row, *names: str) -> str | None:
    for name in names:
        value = row.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return None


def _source(row: Row) -> str | None:
    value = row.get("data_source")
    return value if isinstance(value, str) and value else None


def _gsm8k(row: Row, columns: Columns) -> Example:
    question = text(row, columns.prompt or "question")
    name = columns.answer or "answer"
    solution = text(row, name)
    answer = hash_number(solution)
    if answer is None:
        raise row.error(
            f"column {name!r} ends in no '#### NUMBER' ({excerpt(solution[-40:])})",
            "take GSM8K's own answers, with their solutions",
        )
    return Example(question, answer, response=solution)


def _math500(row: Row, columns: Columns) -> Example:
    problem = text(row, columns.prompt or "problem")
    example_id = _example_id(row, "unique_id")
    if columns.answer or row.has("answer"):
        answer = text(row, columns.answer or "answer")
    else:
        answer = _boxed(row)
    return Example(problem, answer, example_id, response=_solution(row))


def _solution(row: Row) -> str | None:
    value = row.get("solution")
    return value.strip() or None if isinstance(value, str) else None


def _boxed(row: Row) -> str:
    """The answer in a solution, of layouts that have none beside it."""
    if not row.has("solution"):
        raise row.missing("answer", "name the column (--answer-column)", ", nor solution")
    answer = last_boxed(text(row, "solution"))
    if not answer:
        raise row.error(
            "column 'solution' has no \\boxed answer, and there is no column 'answer'",
            "give one of the two",
        )
    return answer


# What AIME's answers, 0 to 999, are wrapped in here and there.
_AIME_ANSWER = re.compile(r"\$?(?:\\boxed\{)?0*(\d{1,3})(?:\.0+)?(?:\^\{?\\circ\}?)?\}?\$?")


def _aime(row: Row, columns: Columns) -> Example:
    example_id = _example_id(row, "id", "ID", "problem_idx", "extra_info.index")
    if columns.prompt:
        problem = text(row, columns.prompt)
    elif isinstance(row.get("prompt"), list):
        problem = _last_user(row, "prompt")
    else:
        problem = text(row, "problem", "Problem", "question", "prompt")
    names = ("answer", "Answer", "reward_model.ground_truth")
    if columns.answer or any(row.has(name) for name in names):
        column = columns.answer or _first(row, names)
        answer = text(row, column)
    else:
        column, answer = "solution", _boxed(row)
    found = _AIME_ANSWER.fullmatch(answer)
    if found is None:
        raise row.error(
            f"column {column!r} has the answer {excerpt(answer)}",
            "AIME's are integers from 0 to 999; mend the row",
        )
    return Example(bare(problem), found[1], example_id, response=_solution(row))


def _dapo_math(row: Row, columns: Columns) -> Example:
    name = columns.prompt or next(
        (n for n in ("source_prompt", "prompt", "problem") if row.has(n)), "prompt"
    )
    if isinstance(row.get(name), list):
        problem = _last_user(row, name)
    else:
        problem = text(row, name)
    names = (
        (columns.answer,) if columns.answer else ("reward_model.ground_truth", "solution", "answer")
    )
    return Example(
        bare(problem),
        text(row, *names),
        _example_id(row, "extra_info.index"),
        _source(row),
    )


def _last_user(row: Row, column: str) -> str:
    """The one message of a prompt that is a conversation of the user's alone."""
    messages = conversation(row, column)
    if [message["role"] for message in messages] != ["user"]:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise row.error(
            f"column {column!r} holds messages of {roles}",
            "expected one of the user's; for conversations take the kind messages",
        )
    return messages[0]["content"]


# The roles of ShareGPT's conversations in OpenAI's words.
_ROLES = {"human": "user", "gpt": "assistant"}


def conversation(row: Row, column: str) -> list[Message]:
    """The messages in a column: `{role, content}`, or ShareGPT's `{from, value}`.

    Raises:
        DataError: it holds something else.
    """
    value = row.get(column)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise row.error(f"column {column!r} holds {excerpt(value)}", "expected a list of messages")
    messages = []
    for index, message in enumerate(value):
        known = message if isinstance(message, dict) else {}
        role, content = known.get("role") or known.get("from"), known.get("content")
        content = known.get("value") if content is None else content
        if not isinstance(role, str) or not isinstance(content, str):
            raise row.error(
                f"column {column!r}, message {index + 1}: {excerpt(message)}",
                'expected {"role": "user", "content": "..."}, both strings',
            )
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def _messages(row: Row, columns: Columns) -> Example:
    name = columns.prompt or _first(row, ("messages", "conversations", "prompt"))
    if not row.has(name):
        raise row.missing(name, "name another (--prompt-column)")
    messages = conversation(row, name)
    said = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    last = said
    if not any(message["role"] == "user" for message in messages):
        raise row.error(
            f"column {name!r} has no message of the user before its answer", "mend the row"
        )
    names = ("answer", "reward_model.ground_truth")
    if columns.answer or any(row.has(n) for n in names):
        last = text(row, *([columns.answer] if columns.answer else names))
    example_id = _example_id(row, "id", "uuid", "extra_info.index")
    return Example(messages, last, example_id, _source(row), response=said)


_VERL = "data_source, prompt (messages), reward_model.ground_truth, extra_info.index"

SOURCES: dict[str, Source] = {
    "gsm8k": Source(
        "GSM8K: grade-school word problems; the answer is the number after ####",
        (("openai/gsm8k, folders main and socratic; grade-school-math", "question, answer"),),
        "hash",
        _gsm8k,
    ),
    "math500": Source(
        "MATH-500, and MATH: competition problems with LaTeX answers",
        (
            ("HuggingFaceH4/MATH-500", "problem, answer, unique_id"),
            ("MATH without answers of their own", "problem, solution (its last \\boxed)"),
        ),
        "boxed",
        _math500,
        500,
    ),
    "dapo_math": Source(
        "DAPO-Math-17k: integer answers, on a last line 'Answer: ...'",
        (
            ("BytedTsinghua-SIA/DAPO-Math-17k (each problem about 100 times)", _VERL),
            ("open-r1/DAPO-Math-17k-Processed", "source_prompt or prompt, solution"),
        ),
        "answer_line",
        _dapo_math,
    ),
    "aime24": Source(
        "AIME 2024: thirty problems, integer answers from 0 to 999",
        (
            ("HuggingFaceH4/aime_2024", "id, problem, answer"),
            ("Maxwell-Jia/AIME_2024", "ID, Problem, Answer"),
            ("math-ai/aime24", "id, problem, solution (its last \\boxed)"),
            ("BytedTsinghua-SIA/AIME-2024", _VERL),
        ),
        "boxed",
        _aime,
        30,
    ),
    "aime25": Source(
        "AIME 2025: thirty problems, integer answers from 0 to 999",
        (
            ("math-ai/aime25, yentinglin/aime_2025", "id, problem, answer"),
            ("opencompass/AIME2025", "question, answer"),
            ("MathArena/aime_2025", "problem_idx, problem, answer"),
        ),
        "boxed",
        _aime,
        30,
    ),
    "messages": Source(
        "conversations; a last turn of the assistant is the answer where no column is",
        (
            ("chat data", "messages | prompt: a list of {role, content}"),
            ("ShareGPT", "conversations: a list of {from, value}"),
            ("any data set in verl's layout", _VERL),
        ),
        "none",
        _messages,
    ),
}
