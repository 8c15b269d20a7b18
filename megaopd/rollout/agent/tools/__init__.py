"""Tools by name, entries of rollout.agent.tools. A new one is an async function and an entry."""

from __future__ import annotations

from megaopd.rollout.agent.tools.calculator import CALCULATOR
from megaopd.rollout.agent.tools.sqlite import SQLITE
from megaopd.rollout.agent.tools.tool import Tool

TOOLS: dict[str, Tool] = {
    "calculator": CALCULATOR,
    "sqlite": SQLITE,
}
