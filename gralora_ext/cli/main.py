# SPDX-License-Identifier: Apache-2.0
"""The console script ``gralora-ext``: finds the subcommand, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module

from ..program.errors import JobError, Stopped, Told, clipped, did_you_mean, first_sentence, stops_unwrapped
from ..program.resources import disk_failure, memory_failure
from ..program.signals import output_is_gone, reader_may_be_gone, silence, stopper
from .checks import check_packages
from .group import Group, end_by, end_now, is_joined
from .launcher import end_with_launcher, place_here, who

USAGE = """\
usage: gralora-ext COMMAND [options]

  finetune         fine-tune a causal language model with GraLoRA (gralora-ext finetune --help)
  merge            merge adapters into a model, from files into files (gralora-ext merge --help)
  export-lora      write a GraLoRA adapter as a LoRA adapter, exactly or of a smaller rank
  import-official  write a checkpoint of the paper's own repository as one that PEFT reads
  compare          train with several methods, and show losses, speed, memory and size side by side
  analyze          rank | outlier | grid: what the paper says of GraLoRA, measured here
  info             what is built, installed and in use, and what to do if something is missing

  --help           this text
  --version        the version of gralora_ext
"""
COMMANDS = ("finetune", "merge", "export-lora", "import-official", "compare", "analyze", "info")


def main(argv: list[str] | None = None) -> int:
    """Runs ``argv`` (the command line where None) and returns the exit code; never raises but for ``--help``'s exit."""
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may answer what the terminal's encoding does not have
    code = _code_of(arguments)
    if is_joined():
        end_now(code)
    return code


def _code_of(arguments: list[str]) -> int:
    try:
        with stops_unwrapped():
            code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except JobError as error:
        return _fail(arguments, str(error), 2)
    except Told as told:
        return told.code
    except Stopped as stop:
        if stopper.quiet:
            end_by(stop.signum)
        where = " before anything was trained;"
        if arguments[0] in ("export-lora", "import-official"):  # a signal waits for the end of their renames
            where = ": if adapter_config.json is in OUT, all is there; else"
        with reader_may_be_gone(sys.stderr):
            print(f"stopped by {stop.name}{where} run the same command again", file=sys.stderr, flush=True)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001  a user gets one sentence, and the traceback for the asking
        if isinstance(error, BrokenPipeError) and output_is_gone():
            silence(sys.stdout.fileno())  # nothing more to flush
            return 141
        return _explain(arguments, error)


def _dispatch(arguments: list[str]) -> int:
    # Imported where it is called: finetune needs packages that info only reports on.
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name == "finetune":
        return _finetune(rest)
    if name in COMMANDS:
        return int(import_module(f".{name.replace('-', '_')}", __package__).run(rest))
    if name in ("--version", "-V"):
        import gralora_ext

        print(f"gralora-ext {gralora_ext.__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    if not name:
        print(USAGE, end="", file=sys.stderr)
        return 2
    hint = did_you_mean(name, COMMANDS)
    raise JobError(f"unknown command '{clipped(name)}'{hint}; the commands are {', '.join(COMMANDS)}")


def _finetune(arguments: list[str]) -> int:
    from .options import parse, settings

    end_with_launcher()
    group = Group(place_here())
    with group.together(meet=False):
        options = parse(arguments)
    if options.print_config:
        if group.is_first:
            print(json.dumps(settings(options), indent=2, ensure_ascii=False))
        return 0
    with group.together(meet=False):
        check_packages()
    if group.size == 1 and ((options.num_processes or 1) > 1 or options.accelerate_config is not None):
        from .spawn import launch

        return launch(options, arguments)
    stopper.install()
    if group.size > 1:
        stopper.share(first=group.is_first)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what fails there, the job tells in one sentence
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; the job's own are lines then
    # Threads that spin while they wait starve each other where cores are shared: small operations
    # then take tens of times as long. The OpenMP runtime reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ..program.memory import keep_freed_memory
    from .finetune import run

    keep_freed_memory()
    return run(options, group)


def _explain(arguments: list[str], error: Exception) -> int:
    """What the machine lacks is the user's to mend; all else is a failure that nobody foresaw."""
    if reason := memory_failure(error):
        less = "try a smaller --batch-size or --max-length, --gradient-checkpointing or --dtype bf16, or "
        return _fail(arguments, f"{reason}: {less if arguments[0] == 'finetune' else ''}free some", 2)
    reason = disk_failure(error)
    if reason is None and isinstance(error, OSError) and not isinstance(error, ConnectionError):
        reason = error.strerror
    if not reason:
        return _fail(arguments, f"{type(error).__name__}: {first_sentence(error)}", 1)
    try:
        sys.stdout.flush()
    except OSError:  # it is what cannot be written, and Python would try once more at its end
        silence(sys.stdout.fileno())
    return _fail(arguments, f"{getattr(error, 'filename', None) or 'standard output or a file'}: {reason}", 2)


def _fail(arguments: list[str], message: str, code: int) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    hint = " (--debug shows where)" if code == 1 and "--debug" not in arguments else ""
    print(f"gralora-ext: error: {who()}{_on_one_line(message)}{hint}", file=sys.stderr)
    return code


def _on_one_line(text: str) -> str:
    """``text`` with what is no printable character, as names of files may have it, in Python's notation."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
