"""Weights in the formats they are stored in: what they stand for, and how to compute with them."""
