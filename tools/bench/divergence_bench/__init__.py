"""The parts of tools/bench/divergence.py: who competes, what is measured, and the table."""
