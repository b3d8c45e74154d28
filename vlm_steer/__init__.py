"""Steer any HuggingFace vision-language model to look at its image."""
