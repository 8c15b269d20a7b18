"""Queries of one SQLite database, for reading alone.

The file is opened read-only, and an authorizer lets statements read tables and call functions of a
list, nothing else: no other file, no pragma, no extension, no write. Time, rows, the length of
values and of the whole result, and SQLite's memory are bounded. Whether the data itself may be
shown to the student is for whoever names the database.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from megaopd.config import AgentConfig
from megaopd.errors import ConfigError
from megaopd.rollout.agent.tools.tool import Tool, ToolError

MAX_ROWS = 100
# Of a result: rows are read until they are longer together. 200 columns of long values in 100 rows
# would be hundreds of megabytes.
MAX_RESULT_CHARS = 1 << 20
MAX_SQL_LENGTH = 10_000
# Of a text or blob, intermediate ones too. A function that searches one text in another takes up to
# the product of their lengths, and nothing stops it on the way.
MAX_VALUE_BYTES = 32 << 10
# SQLite's own, of the whole process. It also ends statements that grow exponentially while they are
# compiled, when older versions than 3.41 do not look at the clock: after 1 to 3 s.
MAX_HEAP_BYTES = 256 << 20
# Virtual machine instructions between two looks at the clock.
CLOCK_INTERVAL = 200
# Queries at a time; others wait, on their own time. Threads of their own: those of the event loop
# send requests to servers.
NUM_THREADS = 16

_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_VALUE_BYTES,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_SQL_LENGTH,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 25_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}

_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}

_FUNCTIONS = (
    # Operators that are functions inside.
    "like glob",
    # Of rows and of windows.
    "avg count group_concat max min sum total",
    "cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank",
    "row_number",
    # Of numbers.
    "abs acos asin atan atan2 ceil ceiling cos degrees exp floor ln log log10 log2 mod pi pow",
    "power radians round sign sin sqrt tan trunc",
    # Of texts and dates; printf with a width of billions runs for minutes, and nothing stops it.
    "char concat concat_ws hex instr length lower ltrim quote replace rtrim substr substring trim",
    "unicode upper",
    "date datetime julianday strftime time timediff unixepoch",
    # Of anything.
    "coalesce ifnull iif likely nullif typeof unlikely",
)
FUNCTIONS = frozenset(name for names in _FUNCTIONS for name in names.split())

_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="sqlite")


def _authorize(
    action: int, first: str | None, second: str | None, database: str | None, source: str | None
) -> int:
    allowed = action in _READING or (
        action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def query(database: str, sql: str, timeout_s: float) -> str:
    """The result of one SELECT: a line of column names, then at most `MAX_ROWS` lines of values,
    separated by `|`; fewer where they are long. A last line says that there are more.

    Raises:
        ToolError: SQLite's own message, a statement that does not read, or one that is too slow or
            needs too much memory.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with closing(_open(database)) as connection:
            connection.set_progress_handler(lambda: time.monotonic() > deadline, CLOCK_INTERVAL)
            cursor = connection.execute(sql)
            if cursor.description is None:
                raise ToolError("the statement returns no rows; write a SELECT")
            lines = ["|".join(column[0] for column in cursor.description)]
            num_chars = 0
            for row in cursor:
                if len(lines) > MAX_ROWS or num_chars > MAX_RESULT_CHARS:
                    lines.append(f"(more than {len(lines) - 1} rows)")
                    break
                lines.append("|".join(map(_as_text, row)))
                num_chars += len(lines[-1])
    except MemoryError:
        raise ToolError("the query needs too much memory") from None
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        if time.monotonic() > deadline:
            raise ToolError(f"the query took longer than {timeout_s:g} s") from None
        raise ToolError(" ".join(str(error).split())[:200]) from None
    return "\n".join(lines)


async def sqlite(config: AgentConfig, *, sql: str) -> str:
    # A thread cannot be cancelled: it keeps the time itself.
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, query, config.database, sql, config.tool_timeout_s)


def _open(database: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{Path(database).resolve().as_uri()}?mode=ro", uri=True)
    try:
        connection.text_factory = lambda text: text.decode(errors="replace")
        for statement in (
            "query_only = ON",
            "trusted_schema = OFF",
            # What does not fit into memory shall fail, not fill a disk.
            "temp_store = MEMORY",
            f"hard_heap_limit = {MAX_HEAP_BYTES}",
        ):
            connection.execute(f"PRAGMA {statement}").fetchall()
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)
        connection.set_authorizer(_authorize)
    except BaseException:
        connection.close()
        raise
    return connection


def _as_text(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return str(value)


def _check(config: AgentConfig) -> None:
    key = "rollout.agent.database"
    if not config.database:
        raise ConfigError(key, "not set, and the tool sqlite reads it", "name an SQLite file")
    try:
        query(config.database, "SELECT count(*) FROM sqlite_master", timeout_s=60.0)
    except ToolError as error:
        found = f"{config.database} cannot be read ({error})"
        raise ConfigError(key, found, "name an SQLite file") from None


SQLITE = Tool(
    description="Runs one SELECT on an SQLite database and returns its rows. The table "
    "sqlite_master tells what tables there are.",
    parameters={"sql": {"type": "string", "description": "one SELECT statement"}},
    function=sqlite,
    check=_check,
)
