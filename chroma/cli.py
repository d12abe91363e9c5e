"""The command line: generate, run, queue; quantize, inspect, lora; doctor."""

import argparse
import logging
import sys
from collections.abc import Sequence

from .cli_doctor import add_doctor_command
from .cli_files import add_file_commands
from .cli_generate import add_generate_command
from .cli_queue import add_queue_command
from .cli_run import add_run_command
from .errors import ChromaError
from .lora.cli import add_lora_commands
from .out_of_memory import telling_out_of_memory

INTERRUPTED = 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="chroma-nodes", description="Chroma text-to-image, and its files."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    computing = [add(commands) for add in (add_generate_command, add_run_command)]
    for command in (*computing, add_file_commands(commands)):
        command.add_argument("--device", help="for instance cpu; else what torch finds")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    add_lora_commands(commands)
    add_queue_command(commands)
    add_doctor_command(commands)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 2 after a user's error, 130 after Ctrl-C."""
    args = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        with telling_out_of_memory():
            lines = args.function(args)
    except ChromaError as error:
        # Names of files and values of users may hold line breaks.
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    for line in lines:
        print(line)
    return 0
