"""Pipelines that draw latents by a prompt: what they share, and a file each."""
