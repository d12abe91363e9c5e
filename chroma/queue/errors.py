"""What can go wrong between this package and a ComfyUI server."""

from ..errors import ChromaError


class QueueError(ChromaError):
    """A batch cannot be run: its rows, its folder, the server or the workflow is at fault."""


class Unreachable(QueueError):
    """Nothing answers at the server's address, or no longer."""


class RowFailed(QueueError):
    """One row came to nothing on the server; other rows may do better."""
