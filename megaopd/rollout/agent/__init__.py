"""Conversations in which the student calls tools."""

from megaopd.rollout.agent.loop import Agent, tool_schemas
from megaopd.rollout.agent.tools import TOOLS

__all__ = ["TOOLS", "Agent", "tool_schemas"]
