"""Prompts become tokens, samples become packed micro-batches; labels are shifted here alone."""
