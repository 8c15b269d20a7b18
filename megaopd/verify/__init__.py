"""Checks a set-up before it costs GPU hours: a table of checks, what each found, and the fix."""
