"""Prompts before they are encoded: wildcards, tags, token counts, long prompts, and a check."""
