"""Directories that are either complete and as they were written, or not there.

Knows files alone: no tensors, no formats of weights.
"""
