"""What a Hugging Face directory holds, and the Megatron-Core model built and filled from it."""
