"""Batches on a ComfyUI server, over HTTP: rows of values, one workflow, pictures in a folder."""

from .batch import Report, run_batch
from .jobs import Job, make_jobs
from .rows import Row, read_rows
from .server import Server

__all__ = ["Job", "Report", "Row", "Server", "make_jobs", "read_rows", "run_batch"]
