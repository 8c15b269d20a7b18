"""The tools against arguments of every kind, most of them hostile."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megaopd.config import AgentConfig
from megaopd.errors import ConfigError
from megaopd.rollout.agent import TOOLS, tool_schemas
from megaopd.rollout.agent.tools import sqlite
from megaopd.rollout.agent.tools.calculator import evaluate
from megaopd.rollout.agent.tools.sqlite import query
from megaopd.rollout.agent.tools.tool import Tool, ToolError

# What SQLite does in one instruction cannot be stopped on the way.
SLACK_S = 5.0


def call(name: str, config: AgentConfig, **arguments: object) -> str:
    return asyncio.run(TOOLS[name].call(config, arguments))


# Arguments that a tool answers, with what it answers. Every tool has a row.
ANSWERS = {
    "calculator": ({"expression": "12 * (3 + 4)"}, "84"),
    "sqlite": ({"sql": "SELECT b FROM t WHERE a = 1"}, "b\nname1"),
}


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    # A name that means something in a URI.
    path = tmp_path_factory.mktemp("database") / "a b?mode=rwc#%41.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t(a INTEGER, b TEXT)")
        rows = [(i, f"name{i}") for i in range(500)]
        connection.executemany("INSERT INTO t VALUES (?, ?)", rows)
        connection.execute("CREATE TABLE odd(a)")
        connection.execute(
            "INSERT INTO odd VALUES (CAST(x'ff41' AS TEXT)), (x'00'), (NULL), (?)", ("x" * 30000,)
        )
    connection.close()
    return path


@pytest.fixture
def config(database) -> AgentConfig:
    return AgentConfig(tools=tuple(TOOLS), database=str(database), tool_timeout_s=5.0)


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool(name: str, config: AgentConfig) -> None:
    """Its schema is OpenAI's, it answers, and it refuses other arguments than it names."""
    arguments, answer = ANSWERS[name]
    tool = TOOLS[name]
    schema = json.loads(json.dumps(tool.schema(name)))
    assert schema["type"] == "function"
    assert schema["function"]["name"] == name
    assert schema["function"]["parameters"]["required"] == list(arguments)
    assert call(name, config, **arguments) == answer
    first = next(iter(arguments))
    with pytest.raises(ToolError, match=f"the argument '{first}' is missing"):
        call(name, config)
    with pytest.raises(ToolError, match="there is no argument 'more'"):
        call(name, config, **arguments, more=1)
    for value in (None, 3, True, ["x"], {"x": 1}):
        with pytest.raises(ToolError, match=f"'{first}' is not of the type string"):
            call(name, config, **{first: value})


def test_types_of_arguments() -> None:
    async def show(config: AgentConfig, *, x: object) -> str:
        return repr(x)

    values = {
        "string": "a",
        "integer": 1,
        "number": 1.5,
        "boolean": True,
        "array": [],
        "object": {},
    }
    for kind, own in values.items():
        tool = Tool("", {"x": {"type": kind}}, show)
        for value in values.values():
            fits = value is own or (kind == "number" and value == 1 and value is not True)
            if fits:
                assert asyncio.run(tool.call(AgentConfig(), {"x": value})) == repr(value)
            else:
                with pytest.raises(ToolError, match="is not of the type"):
                    asyncio.run(tool.call(AgentConfig(), {"x": value}))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("-2 ** 2", "-4"),
        ("2 ** 3 ^ 2", "512"),
        ("2 ** -2", "0.25"),
        ("10 - 3 - 2", "5"),
        ("7 // -2", "-4"),
        ("-7 % 3", "2"),
        ("1 / 3 * 3", "1"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.333333333333"),
        (".5 + 5.", "5.5"),
        ("1.5e3", "1500"),
        ("sqrt(2)", "1.41421356237"),
        ("sqrt(16 / 81) * 9", "4"),
        ("2 ^ 0.5", "1.41421356237"),
        ("0 ** 0 + 0 ** 2 + (-1) ** 3", "0"),
        ("max(1, 2, 3) - min(4, abs(-5))", "-1"),
        ("round(2.5) + floor(-0.5) + ceil(0.1)", "2"),
        ("2 * pi", "6.28318530718"),
        ("12345678901234567890 * 98765432109876543210", "1219326311370217952237463801111263526900"),
        ("+".join(["1/3"] * 200), "66.6666666667"),
        ("(-1) ** 1e200", "1"),
    ],
)
def test_calculator(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "ends too early"),
        ("1 +", "ends too early"),
        ("1 1", "expected an operator or the end, found '1'"),
        ("2 * )", "expected a number, found ')'"),
        ("(1", "ends too early"),
        ("abs(1, 2)", "abs takes 1 argument, found 2"),
        ("1 / (2 - 2)", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("5 % 0", "division by zero"),
        ("sqrt(-1)", "square root of a negative number"),
        ("(-8) ** (1/3)", "a negative number to the power of a fraction"),
        ("__import__('os').system('ls')", "cannot read"),
        ("open(1)", "there is no 'open'"),
        ("x.__class__", "cannot read"),
        ("lambda: 1", "cannot read"),
        ("\u0663 + 1", "cannot read"),
        ("1\x00", "cannot read"),
        ("1_000", "expected an operator"),
        ("9 ** 9 ** 9", "out of range"),
        ("9 ** 9 ** 9 ** 9 ** 9", "out of range"),
        ("(1 / 9) ** (9 ** 9)", "out of range"),
        ("1e999", "out of range"),
        ("1e999999999", "expected an operator"),
        ("1" * 900, "out of range"),
        ("*".join(["1e99"] * 100), "out of range"),
        ("(" * 400 + "1" + ")" * 400, "nested deeper than 50"),
        ("-" * 900 + "1", "nested deeper than 50"),
        ("2 **" * 200 + "2", "nested deeper than 50"),
        ("abs(" * 200, "nested deeper than 50"),
        ("1 + " * 100_000 + "1", "more than 1000"),
    ],
)
def test_calculator_refuses(expression: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(ToolError) as caught:
        evaluate(expression)
    assert message in str(caught.value)
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT count(*), max(a) FROM t", ["count(*)|max(a)", "500|499"]),
        ("SELECT name FROM sqlite_master", ["name", "t", "odd"]),
        ("SELECT a FROM odd LIMIT 3", ["a", "\ufffdA", "<1 bytes>", "NULL"]),
        ("VALUES (1), (2)", ["column1", "1", "2"]),
        (
            "SELECT upper(b) AS x, row_number() OVER (ORDER BY a DESC) AS n FROM t "
            "WHERE b LIKE 'NAME49_' LIMIT 2",
            ["x|n", "NAME499|1", "NAME498|2"],
        ),
        (
            "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x * 2 FROM c WHERE x < 5) "
            "SELECT group_concat(x) AS all_of_it FROM c",
            ["all_of_it", "1,2,4,8"],
        ),
        ("SELECT date('2024-01-31', '+1 day') AS d", ["d", "2024-02-01"]),
        ("SELECT 1 AS a WHERE 0", ["a"]),
        ("SELECT 1 AS a /* one; two */;", ["a", "1"]),
    ],
)
def test_sqlite(database: Path, sql: str, rows: list[str]) -> None:
    assert query(str(database), sql, 5.0).splitlines() == rows


def test_sqlite_cuts_rows(database: Path) -> None:
    lines = query(str(database), "SELECT a FROM t ORDER BY a", 5.0).splitlines()
    assert lines == ["a", *map(str, range(100)), "(more than 100 rows)"]


def test_sqlite_cuts_a_long_result(database: Path) -> None:
    """190 values of 30,000 characters in each of 100 rows would be half a gigabyte."""
    columns = ",".join(["o.a"] * 190)
    sql = f"SELECT {columns} FROM odd o, t WHERE length(o.a) > 9"
    text = query(str(database), sql, 60.0)
    assert len(text) < sqlite.MAX_RESULT_CHARS + 191 * 30_001
    assert text.endswith("\n(more than 1 rows)")


def test_sqlite_leaves_the_threads_of_the_event_loop_alone(config: AgentConfig) -> None:
    """Requests to servers need them while queries run."""
    config = replace(config, tool_timeout_s=0.8)
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"

    async def others_work() -> float:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        start = time.monotonic()
        queries = [asyncio.create_task(TOOLS["sqlite"].call(config, {"sql": endless}))]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(int)
        waited_s = time.monotonic() - start
        with pytest.raises(ToolError, match="longer than"):
            await queries[0]
        return waited_s

    assert asyncio.run(others_work()) < 0.6


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1, 2)",
        "UPDATE t SET a = 1",
        "DELETE FROM t",
        "DROP TABLE t",
        "REPLACE INTO t VALUES (1, 2)",
        "CREATE TABLE x(a)",
        "CREATE TEMP TABLE x(a)",
        "CREATE VIEW v AS SELECT 1",
        "CREATE TRIGGER r AFTER INSERT ON t BEGIN SELECT 1; END",
        "CREATE VIRTUAL TABLE f USING fts5(a)",
        "ALTER TABLE t RENAME TO u",
        "ATTACH '{directory}/other.db' AS other",
        "ATTACH '{directory}/secret.db' AS secret",
        "DETACH main",
        "VACUUM",
        "VACUUM INTO '{directory}/copy.db'",
        "ANALYZE",
        "BEGIN",
        "SAVEPOINT s",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(t)",
        "PRAGMA writable_schema = ON",
        "SELECT * FROM pragma_table_info('t')",
        "SELECT load_extension('{directory}/x')",
        "SELECT fts3_tokenizer('simple')",
        "SELECT readfile('{directory}/secret.db')",
        "SELECT writefile('{directory}/x', 'a')",
        "SELECT printf('%.*c', 2000000000, 'x')",
        "SELECT zeroblob(1000000000)",
        "SELECT randomblob(1000000000)",
        "SELECT * FROM dbstat",
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP TABLE t",
        "SELECT ?",
        "SELECT",
        "",
        "-- nothing",
        "SELECT 'half of a pair \ud800'",
        "SELECT \x00 1",
        "x" * 100_000,
        "SELECT " + "(" * 2000 + "1" + ")" * 2000,
        "SELECT " + "1+" * 2000 + "1",
        "SELECT 1" + " UNION SELECT 1" * 300,
        "SELECT " + ",".join(["1"] * 3000),
    ],
)
def test_sqlite_refuses(database: Path, sql: str) -> None:
    directory = database.parent
    before = database.read_bytes()
    start = time.monotonic()
    with pytest.raises(ToolError):
        query(str(database), sql.replace("{directory}", str(directory)), 5.0)
    assert time.monotonic() - start < 2.0
    assert database.read_bytes() == before
    assert list(directory.iterdir()) == [database]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM t a, t b, t c, t d",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION SELECT x + 1 FROM c) SELECT count(*) FROM c",
        # What an instruction takes adds up until the next look at the clock.
        "SELECT " + ",".join(["instr(o.a, substr(o.a, 15000) || 'b')"] * 100) + " FROM t, odd o "
        "WHERE length(o.a) > 9 ORDER BY 1",
    ],
)
def test_sqlite_keeps_its_time(database: Path, sql: str) -> None:
    start = time.monotonic()
    with pytest.raises(ToolError, match=r"longer than 0\.2 s"):
        query(str(database), sql, 0.2)
    assert time.monotonic() - start < 0.2 + SLACK_S


def test_sqlite_ends_statements_that_grow_without_end(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each table is two of the one before it; SQLite writes all of them out when it compiles."""
    monkeypatch.setattr(sqlite, "MAX_HEAP_BYTES", 32 << 20)
    tables = ["a0 AS (SELECT 1 AS x)"]
    tables += [f"a{i} AS (SELECT p.x FROM a{i - 1} p, a{i - 1} q)" for i in range(1, 30)]
    sql = f"WITH {', '.join(tables)} SELECT * FROM a29"
    start = time.monotonic()
    with pytest.raises(ToolError, match=r"too much memory|longer than"):
        query(str(database), sql, 0.2)
    assert time.monotonic() - start < 0.2 + SLACK_S


def test_sqlite_keeps_its_memory(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk nothing is written either; afterwards all is as before."""
    monkeypatch.setattr(sqlite, "MAX_HEAP_BYTES", 32 << 20)
    sql = "SELECT o.a || x.a FROM odd o, t x, t y WHERE length(o.a) > 9 ORDER BY 1"
    with pytest.raises(ToolError, match="needs too much memory"):
        query(str(database), sql, 60.0)
    with pytest.raises(ToolError, match="too big"):
        query(str(database), "SELECT group_concat(x.b) FROM t x, t y", 60.0)
    assert query(str(database), "SELECT count(*) AS n FROM t", 5.0) == "n\n500"


def test_a_database_that_cannot_be_read(tmp_path: Path) -> None:
    config = AgentConfig(tools=("sqlite",))
    with pytest.raises(ConfigError, match=r"rollout\.agent\.database: not set"):
        tool_schemas(config)
    for path in (tmp_path / "missing.db", tmp_path, Path(__file__)):
        with pytest.raises(ConfigError, match="cannot be read"):
            tool_schemas(AgentConfig(tools=("sqlite",), database=str(path)))
    assert list(tmp_path.iterdir()) == []
