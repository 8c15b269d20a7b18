"""The Megatron side of a step: forward and backward schedules, the optimizer, the student."""
