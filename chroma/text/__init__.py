"""Prompts to text embeddings: tokenizer, prompt weights, T5."""
