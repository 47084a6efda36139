"""Command line: ``python -m blurry_attn.lm train | generate | compare``, or ``blurry-lm``."""

from __future__ import annotations

import argparse
import errno
import io
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

EXTRA = ("tqdm", "safetensors", "matplotlib", "numpy")
try:
    import torch

    from .. import _C, __version__
    from . import checkpoint
    from .checkpoint import TrainConfig
    from .compare import PLOT as COMPARE_PLOT
    from .compare import compare
    from .data import InputError
    from .generate import Sampling, generate, newest_run
    from .model import MIXERS, ModelConfig
    from .parallel import STRATEGIES, agreed, end, joined, rank
    from .train import PLOT, Found, Interrupted, train
except ModuleNotFoundError as error:
    if error.name not in EXTRA:
        raise
    sys.exit(f"blurry-lm: {error.name} is missing; the language model needs: pip install {' '.join(EXTRA)}")

PROGRAM, MODULE = "blurry-lm", "python -m blurry_attn.lm"
RUNS = Path("runs")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# An error of a file that is written names the file; one of these that names none is standard output's.
OUTPUT = (*FULL, errno.EPIPE, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C.

    A process that torchrun started ends with that status instead.
    """
    status = _run(_parser().parse_args(arguments))
    end(status)
    return status


def _run(args: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may lack a character.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with joined():
            status = args.command(args)
            print(end="", flush=True)
            return status
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in OUTPUT:
            error.filename = "standard output"
            # The interpreter's last flush would fail too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return 0
        print(f"{PROGRAM}: error: {_told(error)}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if rank() == 0:
            print(f"{PROGRAM}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        return 130


def _told(error: Exception) -> str:
    """What a user can do about an error, in one line; raises what is no user's concern."""
    if isinstance(error, OSError) and error.filename is not None:
        advice = "; make room there, and go on from what was saved" if error.errno in FULL else ""
        return f"{error.filename}: {error.strerror}{advice}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        return "out of memory; a smaller --batch, --context, --dim, --layers or --slots needs less"
    if isinstance(error, (InputError, OSError)):
        return str(error)
    raise error


def _train(args: argparse.Namespace) -> int:
    if args.resume:
        folder = args.run or newest_run(RUNS)
        saved = checkpoint.load(folder)
        model_config, train_config = saved.model_config, saved.train_config
        for config in (model_config, train_config):
            for name, value in _given(args, type(config)).items():
                known = getattr(config, name)
                if name == "steps" and value < known:
                    raise InputError(
                        f"--steps: {folder} was started with {known}, which can grow, got {value} to resume"
                    )
                if name not in ("steps", "threads") and value != known:
                    option = name.replace("_", "-")
                    raise InputError(f"--{option}: {folder} was started with {known}, got {value} to resume")
        train_config = replace(train_config, threads=args.threads, steps=args.steps or train_config.steps)
        if saved.step == train_config.steps:
            print(f"{folder}: all {saved.step} steps are done; a larger --steps trains longer")
    else:
        model_config, train_config = _configs(args)
        names = (f"{model_config.mixer}-{n}" if n > 1 else model_config.mixer for n in count(1))
        folder = agreed(args.run or next(RUNS / name for name in names if not (RUNS / name).exists()))
    found: Found = "shorter" if args.resume else "none"
    try:
        result = train(model_config, train_config, folder, _device(args), args.parallel, found)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; to continue: {MODULE} train --resume --run {folder}") from None
    print(
        f"{result.bits:.3f} bits per byte on held-out text (unigram {result.unigram:.3f}, bigram {result.bigram:.3f})\n"
        f"plot {folder / PLOT}; to sample: {MODULE} generate --run {folder}"
    )
    return 0


def _generate(args: argparse.Namespace) -> int:
    sampling = Sampling(**_given(args, Sampling))
    if "OMP_NUM_THREADS" not in os.environ:
        # One byte of one sequence is too little work to share.
        torch.set_num_threads(1)
    line = generate(args.run or newest_run(RUNS), args.prompt, args.tokens, sampling, _device(args), sys.stdout)
    print(line, file=sys.stderr)
    return 0


def _compare(args: argparse.Namespace) -> int:
    model_config, train_config = _configs(args)
    try:
        table = compare(model_config, train_config, args.learning_rates, args.run, _device(args))
    except Interrupted as stop:
        raise Interrupted(f"{stop}; the same command continues") from None
    print(f"{table}\nplot {args.run / COMPARE_PLOT}")
    return 0


def _given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The options of ``config`` that stand on the command line."""
    values = {field.name: getattr(args, field.name, None) for field in fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def _configs(args: argparse.Namespace) -> tuple[ModelConfig, TrainConfig]:
    return replace(ModelConfig(), **_given(args, ModelConfig)), replace(TrainConfig(), **_given(args, TrainConfig))


def _device(args: argparse.Namespace) -> torch.device:
    if args.device is None:
        return torch.device("cuda" if torch.cuda.is_available() and _C.build_info()["cuda"] else "cpu")
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("want cpu or cuda")
        torch.empty(0, device=device)
        if device.type == "cuda" and not _C.build_info()["cuda"]:
            raise RuntimeError("this package was built without CUDA")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: cannot be used ({str(error).splitlines()[0]})") from None
    return device


def _version() -> str:
    built_for = _C.build_info()["cuda"]
    kernels = f"CUDA {built_for}" if built_for else "the CPU alone"
    return (
        f"{PROGRAM} {__version__}, built for {kernels}; torch {torch.__version__}; Python {platform.python_version()}"
    )


def _parser() -> argparse.ArgumentParser:
    model, schedule, sampling = ModelConfig(), TrainConfig(), Sampling()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", help="where to compute: cpu, cuda or cuda:N (default: the GPU if there is one)")

    shape = argparse.ArgumentParser(add_help=False)
    shape.add_argument(
        "--text",
        type=_absolute,
        metavar="FILE_OR_FOLDER",
        help="what to train on; a tenth of it is held out (default: the Python library's sources)",
    )
    shape.add_argument(
        "--dim", type=int, metavar="N", help=f"width of the model, a multiple of twice the heads ({model.dim})"
    )
    shape.add_argument("--layers", type=int, metavar="N", help=f"layers of the model ({model.layers})")
    shape.add_argument(
        "--slots", type=int, metavar="N", help=f"slots per head; tokens in a sliding window ({model.slots})"
    )
    default = ",".join(map(str, model.resolutions))
    shape.add_argument(
        "--resolutions", type=_integers, metavar="R,R,...", help=f"tokens per slot, one number per head ({default})"
    )
    shape.add_argument("--context", type=int, metavar="N", help=f"bytes per training sequence ({schedule.context})")
    shape.add_argument("--batch", type=int, metavar="N", help=f"sequences per step ({schedule.batch})")
    shape.add_argument("--seed", type=int, metavar="N", help=f"of weights and batches ({schedule.seed})")
    shape.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="on the CPU (default: OMP_NUM_THREADS, or one or all, whichever is measured to be faster)",
    )

    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="A small byte-level language model on blurry window attention.",
        epilog=f"{PROGRAM} COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="train | generate | compare")

    sub = commands.add_parser(
        "train",
        parents=[shape, common],
        help="train a model",
        description="Trains a model; Ctrl-C saves it, and --resume goes on. Defaults are in brackets.",
    )
    sub.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"steps in all, over which the learning rate rises and falls; can grow with --resume ({schedule.steps})",
    )
    sub.add_argument("--mixer", choices=MIXERS, help=f"what mixes tokens ({model.mixer})")
    sub.add_argument("--learning-rate", type=float, metavar="RATE", help=f"its peak ({schedule.learning_rate:g})")
    sub.add_argument(
        "--run", type=_path, metavar="FOLDER", help=f"what is written goes here (default: a new one in {RUNS}/)"
    )
    sub.add_argument(
        "--resume", action="store_true", help="continue the run in --run (default: the newest), with its options"
    )
    sub.add_argument(
        "--parallel",
        choices=STRATEGIES,
        default=STRATEGIES[0],
        help="what the processes of torchrun divide: batches, batches and parameters, or heads (%(default)s)",
    )
    sub.set_defaults(command=_train)

    sub = commands.add_parser(
        "generate",
        parents=[common],
        help="continue a prompt",
        description="Continues a prompt, byte by byte, with a trained model. Defaults are in brackets.",
    )
    sub.add_argument("--run", type=_path, metavar="FOLDER", help=f"a trained run (default: the newest in {RUNS}/)")
    sub.add_argument("--prompt", default="def ", metavar="TEXT", help="text to continue (%(default)r)")
    sub.add_argument("--tokens", type=int, default=400, metavar="N", help="bytes to add (%(default)s)")
    sub.add_argument(
        "--temperature", type=float, metavar="T", help=f"0 takes the likeliest byte ({sampling.temperature:g})"
    )
    sub.add_argument(
        "--top-k", type=int, metavar="K", help=f"draw from the K likeliest bytes; 0: from all ({sampling.top_k})"
    )
    sub.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"draw from the likeliest bytes that fill this share ({sampling.top_p:g})",
    )
    sub.add_argument("--seed", type=int, metavar="N", help=f"of the draws ({sampling.seed})")
    sub.set_defaults(command=_generate)

    sub = commands.add_parser(
        "compare",
        parents=[shape, common],
        help="train all three mixers alike and plot them",
        description="Trains the three mixers alike; after Ctrl-C the same command goes on. Defaults are in brackets.",
    )
    sub.add_argument("--steps", type=int, metavar="N", help=f"steps of each run ({schedule.steps})")
    sub.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[2e-3, 4e-3],
        metavar="RATE",
        help="tried for each mixer (%(default)s)",
    )
    sub.add_argument("--run", type=_path, metavar="FOLDER", default=RUNS / "compare", help="(%(default)s)")
    sub.set_defaults(command=_compare)
    return parser


def _path(text: str) -> Path:
    """A path that safetensors and JSON take."""
    try:
        if text.encode():
            return Path(text)
    except UnicodeEncodeError:
        pass
    raise argparse.ArgumentTypeError(f"want a path in UTF-8, got {text!r}")


def _absolute(text: str) -> str:
    return str(_path(text).absolute())


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"want whole numbers with commas between, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
