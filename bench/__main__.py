"""Measures cross-entropy losses on this machine and compares the results."""

from __future__ import annotations

import os
import sys
from importlib import import_module

# Command: (module:function, help text). A module is imported when its command is called, because
# not all need matplotlib.
COMMANDS = {
    "loss": ("loss:main", "the loss of logits and its gradient, beside torch and others (default)"),
    "linear": ("linear:main", "a linear layer and its loss, beside the bare matrix products"),
    "sparse": (
        "sparse:main",
        "several labels in a row, and log-probabilities of selected classes",
    ),
    "parallel": ("parallel:main", "a vocabulary that is split over processes, on the CPU"),
    "transformers": ("transformers:main", "training steps of a small Llama of transformers"),
    "overhead": ("overhead:main", "the overhead of a call, on tiny inputs and one thread"),
    "sweep": ("loss:sweep_main", "the loss at 1000 to 262144 classes"),
    "roofline": ("roofline:main", "how close losses come to the limits of this machine"),
    "confident": (
        "confident:main",
        "trains until all rows are certain, with torch's loss and ours",
    ),
    "compare": ("compare:main", "compares two --json files: exit status 1 if the second is slower"),
    "plot": ("plots:main", "plots --json files, as PNG and SVG"),
}
NEEDED = {"rich", "matplotlib"}


def usage() -> str:
    """Returns the help text: all commands."""
    commands = "\n".join(f"  {name:14}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: python -m bench [COMMAND] ...\n\n{__doc__}\n\n{commands}\n\n"
        "python -m bench COMMAND --help lists the options of a command."
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
    """Runs the program; Ctrl-C and errors of stdout end it without a traceback."""
    sys.stdout.reconfigure(errors="replace")  # the terminal may lack a character
    try:
        status = main()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:  # outside of a measurement, which handles it itself
        return 130
    except BrokenPipeError:  # 128 + SIGPIPE, as a program in C would end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"python -m bench: error: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


if __name__ == "__main__":
    sys.exit(run())
