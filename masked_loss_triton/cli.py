"""The command line, `masked-loss` or `python -m masked_loss_triton`: one subcommand per module of COMMANDS.

A command module has HELP (one line), EXAMPLE (a command line), `add_arguments(parser)` and `run(args) -> int`, and imports
what is heavy inside `run`, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from masked_loss_triton.errors import UserError, install_command
from masked_loss_triton.files.progress import printable

COMMANDS = {
    "demo": "masked_loss_triton.commands.demo",
    "generate": "masked_loss_triton.commands.generate",
    "edit": "masked_loss_triton.commands.edit",
    "cache": "masked_loss_triton.commands.cache",
    "check": "masked_loss_triton.commands.check",
    "inspect": "masked_loss_triton.commands.inspect",
    "train": "masked_loss_triton.commands.train",
    "crop": "masked_loss_triton.commands.crop",
    "captions": "masked_loss_triton.commands.captions",
    "to-alpha": "masked_loss_triton.commands.to_alpha",
    "bench": "masked_loss_triton.commands.bench",
}
# What flags were called in 0.1; they are understood until 0.3.
_MASKS = {"--mask_directory": "--masks"}
RENAMED = {
    "generate": {
        "--input_dir": "--images", "--output_dir": "--masks", "--padding": "--mask_dilate", "--blur": "--mask_blur",
    },
    "edit": _MASKS,
    "cache": {**_MASKS, "--dry-run": "--dry_run"},
    "check": _MASKS,
    "inspect": {**_MASKS, "--out": "--output", "--limit": "--sheet_limit"},
    "to-alpha": {"--out": "--output"},
    "bench": {"--out": "--output"},
}  # fmt: skip
# The extra of pyproject.toml that installs each optional package, by the name under which it is imported.
EXTRAS = {
    **dict.fromkeys(("diffusers", "peft", "skimage", "sklearn", "matplotlib"), "demo"),
    **dict.fromkeys(("av", "tomli"), "cache"),
    **dict.fromkeys(("transformers", "torchvision"), "generate"),
    "onnxruntime": "onnx",
    "ray": "ray",
    **dict.fromkeys(("starlette", "uvicorn"), "edit"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, with the flag that was probably meant, and ends with status 2."""

    commands: Any = None
    words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"argument COMMAND: invalid choice: '([^']*)'", message)
        near = difflib.get_close_matches(wrong[1], COMMANDS, 1) if wrong else []
        hint = f"; did you mean {near[0]}?" if near else ""
        if "arguments are required" in message:  # argparse looks for these before it looks at what it does not know
            hint = next((f"; {word} is unknown{found}" for word in self.words if (found := self.hint(word))), "")
        self.exit(2, printable(f"{self.prog}: {message}{hint} (--help shows all)") + "\n")

    def hint(self, word: str) -> str:
        """The flag that an unknown word was probably meant to be, as the end of a line; "" where none is near."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        word = word.partition("=")[0]
        known = not word.startswith("--") or any(flag.startswith(word) for flag in flags)
        near = [] if known else difflib.get_close_matches(word, flags, 1, 0.75)
        return f"; did you mean {near[0]}?" if near else ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = self.commands.choices[found.command] if self.commands is not None else self
            command.error(f"unknown argument {unknown[0]}{command.hint(unknown[0])}")
        return found


class Version(argparse.Action):
    """Prints the version, read from what is installed: importing torch for it would take seconds."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            parser.exit(0, f"masked_loss_triton {version('masked_loss_triton')}\n")
        except PackageNotFoundError:
            parser.exit(0, "masked_loss_triton, not installed\n")


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the program, with one parser for each command."""
    parser = Parser(
        prog="masked-loss",
        description="Masked loss for fine-tuning video and image diffusion models.",
        epilog="Exit status: 0 done, 1 the work found problems, 2 bad usage.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action=Version, nargs=0, help="show the version")
    parser.commands = subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        command = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"Example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # SUPPRESS: without it the subcommand's default would overwrite a --debug given before the subcommand.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def explain(error: BaseException) -> tuple[str, int] | None:
    """Returns what to tell the user about an error, and the exit status; None for a bug, whose traceback is wanted."""
    if isinstance(error, UserError):
        return str(error), error.exit_status
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        if package in ("", "masked_loss_triton"):
            return None
        extra = EXTRAS.get(package)
        hint = install_command(extra) if extra else "install it"
        return f"needs the package {package!r}: {hint}", 2
    if isinstance(error, ImportError):
        # opencv-python wants the libraries of a screen (libGL), which a server may lack.
        hint = "where there is no screen: pip install --force-reinstall opencv-python-headless"
        return (f"a package cannot be loaded ({error}); {hint}", 2) if "lib" in str(error) else None
    if isinstance(error, OSError):
        return (f"{error.filename}: " if error.filename else "") + (error.strerror or str(error)), 1
    return ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else None


def renamed(argv: Sequence[str]) -> list[str]:
    """The command line with today's names of flags; says which were older ones."""
    command = next((word for word in argv if word in COMMANDS), "")
    found, foreign = [], False
    for word in argv:
        flag, equals, value = word.partition("=")
        foreign = foreign or word in ("--", "--encode")  # what follows is the trainer's
        new = None if foreign else RENAMED.get(command, {}).get(flag)
        if new is not None:
            print(f"masked-loss {command}: {flag} is called {new} now", file=sys.stderr)
        found.append(f"{new}{equals}{value}" if new is not None else word)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = build_parser().parse_args(renamed(sys.argv[1:] if argv is None else argv))
    # Pillow's word to programmers about large pictures, which are refused where they are too large.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    try:
        return args.run(args)
    except BrokenPipeError:
        # The reader of our output has gone (head); the interpreter must not complain about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None or (args.debug and isinstance(error, Exception)):
            raise
        print(printable(f"masked-loss {args.command}: {explained[0]}"), file=sys.stderr)
        return explained[1]


if __name__ == "__main__":
    sys.exit(main())
