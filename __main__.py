"""`python -m chroma_nodes` is the same as `chroma-nodes`."""

from .chroma.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
