"""The errors a user can cause. Each message says what, where, what was expected, and the remedy."""


class ChromaError(ValueError):
    """Bad input to this package; the message is one line meant for the user."""

    def __init_subclass__(cls) -> None:
        # ComfyUI loads the pack under the path of its folder, and shows an error's module.
        cls.__module__ = "chroma_nodes.chroma.errors"


class CheckpointError(ChromaError):
    """A model file is unreadable, of another model, incomplete or damaged."""


class LoraError(ChromaError):
    """A LoRA file is unreadable, of another model, damaged, or cannot be applied."""


class PromptError(ChromaError):
    """A prompt cannot be encoded."""


class SamplingError(ChromaError):
    """Sampling options or sigmas make no sense."""


class ImageError(ChromaError):
    """An image, mask or picture size cannot be used."""


class WorkflowError(ChromaError):
    """A workflow cannot be executed; the message names the node."""


class OutOfMemoryError(ChromaError):
    """A computation or a file needs more memory than there is; the message tells what to try."""


class QueueError(ChromaError):
    """A batch cannot be queued: its rows, its folder, the server or the workflow is at fault."""


class Unreachable(QueueError):
    """Nothing answers at the server's address, or no longer."""


class RowFailed(QueueError):
    """One row came to nothing on the server; other rows may do better."""
