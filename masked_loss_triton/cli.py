"""The command line, `masked-loss` or `python -m masked_loss_triton`: one subcommand per module of COMMANDS.

A command module has HELP (one line), EXAMPLE (a command line), `add_arguments(parser)` and `run(args) -> int`, and imports
what is heavy inside `run`, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from masked_loss_triton.errors import UserError

COMMANDS = {
    "demo": "masked_loss_triton.commands.demo",
    "generate": "masked_loss_triton.commands.generate",
    "cache": "masked_loss_triton.commands.cache",
    "check": "masked_loss_triton.commands.check",
    "inspect": "masked_loss_triton.commands.inspect",
    "train": "masked_loss_triton.commands.train",
    "to-alpha": "masked_loss_triton.commands.to_alpha",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="masked-loss",
        description="Masked loss for fine-tuning video and image diffusion models.",
        epilog="Exit status: 0 done, 1 the work found problems, 2 bad usage.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"masked-loss {args.command}: {error}", file=sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        # A missing extra is the user's to mend; a missing module of this package is a bug.
        if args.debug or (error.name or "").startswith("masked_loss_triton"):
            raise
        extra = args.command if args.command in ("demo", "generate") else "cache"
        print(
            f"masked-loss {args.command}: needs the package {error.name!r}: pip install 'masked_loss_triton[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except ImportError as error:
        # opencv-python wants the libraries of a screen (libGL), which a server may lack.
        if args.debug or "lib" not in str(error):
            raise
        print(
            f"masked-loss {args.command}: a package cannot be loaded ({error}); "
            "where there is no screen: pip install --force-reinstall opencv-python-headless",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        # Whoever read our output has enough of it; the interpreter must not complain about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if args.debug:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"masked-loss {args.command}: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"masked-loss {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
