"""Selective Amnesia for diffusers: make a deep generative model forget a concept on command."""

__version__ = "0.1.0"
