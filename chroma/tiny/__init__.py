"""The small trained Chroma that ships with the pack, and everything needed to rebuild it."""
