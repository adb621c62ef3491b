"""Measures cross-entropy losses on this machine, and compares what was measured."""

from __future__ import annotations

import os
import sys
from importlib import import_module

# Command: the module and the function, and what it does. Each is imported when it is called: only
# plots need matplotlib.
COMMANDS = {
    "loss": ("loss:main", "the loss of logits and its gradient, beside torch and others (default)"),
    "linear": ("linear:main", "a linear layer and its loss, beside the bare matrix products"),
    "overhead": ("overhead:main", "the price of a call, on tiny inputs and one thread"),
    "sweep": ("loss:sweep_main", "the loss at 1000 to 262144 classes"),
    "roofline": ("roofline:main", "how near they come to what this machine can do"),
    "compare": ("compare:main", "two --json files: status 1 where the second is slower"),
    "plot": ("plots:main", "plots of --json files, as PNG and SVG"),
}
NEEDED = {"rich", "matplotlib"}


def usage() -> str:
    """What there is."""
    commands = "\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: python -m bench [COMMAND] ...\n\n{__doc__}\n\n{commands}\n\n"
        "python -m bench COMMAND --help tells the options of each."
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["-h"], ["--help"], ["help"]):
        print(usage())
        return 0
    name = "loss"
    if arguments and arguments[0] in COMMANDS:
        name, *arguments = arguments
    module, function = COMMANDS[name][0].split(":")
    try:
        command = getattr(import_module(f".{module}", __package__), function)
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        message = f"python -m bench {name}: error: needs {error.name}: pip install '.[bench]'"
        print(message, file=sys.stderr)
        return 2
    return command(arguments)


def run() -> int:
    """The program: what goes wrong with stdout and the keyboard ends it without a traceback."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without some character
    try:
        status = main()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:  # before there was anything to print
        return 130
    except BrokenPipeError:  # as a program in C that SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"python -m bench: error: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


if __name__ == "__main__":
    sys.exit(run())
