"""Conversion between Hugging Face directories and Megatron checkpoints, and its proof.

One tensor at a time is in memory, alone or over the processes of torchrun. What the families' one
mapping table says is all that is known here of a model.
"""
