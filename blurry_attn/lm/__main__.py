"""Command line: ``python -m blurry_attn.lm train | generate | compare``, or ``blurry-lm``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

EXTRA = ("tqdm", "safetensors", "matplotlib", "numpy")
try:
    import torch

    from .. import _C
    from . import checkpoint
    from .checkpoint import TrainConfig
    from .compare import PLOT as COMPARE_PLOT
    from .compare import compare
    from .data import InputError
    from .generate import Sampling, generate, newest_run
    from .model import MIXERS, ModelConfig
    from .parallel import STRATEGIES, agreed, end, joined, rank
    from .train import PLOT, Interrupted, train
except ModuleNotFoundError as error:
    if error.name not in EXTRA:
        raise
    sys.exit(f"blurry-lm: {error.name} is missing; the language model needs: pip install {' '.join(EXTRA)}")

PROGRAM = "blurry-lm"
RUNS = Path("runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C.

    A process that torchrun started ends with that status instead.
    """
    status = _run(_parser().parse_args(arguments))
    end(status)
    return status


def _run(args: argparse.Namespace) -> int:
    try:
        with joined():
            return args.command(args)
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails too
            return 0
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if rank() == 0:
            print(f"{PROGRAM}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        return 130


def _train(args: argparse.Namespace) -> int:
    if args.resume:
        folder = args.run or newest_run(RUNS)
        saved = checkpoint.load(folder)
        model_config, train_config = saved.model_config, saved.train_config
        for config in (model_config, train_config):
            for name, value in _given(args, type(config)).items():
                if value != getattr(config, name):
                    option = name.replace("_", "-")
                    raise InputError(
                        f"--{option}: {folder} was started with {getattr(config, name)}, got {value} to resume"
                    )
    else:
        model_config, train_config = _configs(args)
        names = (f"{model_config.mixer}-{n}" if n > 1 else model_config.mixer for n in count(1))
        folder = agreed(args.run or next(RUNS / name for name in names if not (RUNS / name).exists()))
        if (folder / checkpoint.FILE).exists():
            raise InputError(f"{folder}: holds a run already; --resume continues it, another --run starts anew")
    try:
        result = train(model_config, train_config, folder, _device(args), args.parallel)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; to continue: python -m blurry_attn.lm train --resume --run {folder}") from None
    print(
        f"{result.bits:.3f} bits per byte on held-out text (unigram {result.unigram:.3f}, bigram {result.bigram:.3f})\n"
        f"plot {folder / PLOT}; to sample: python -m blurry_attn.lm generate --run {folder}"
    )
    return 0


def _generate(args: argparse.Namespace) -> int:
    sampling = Sampling(**_given(args, Sampling))
    torch.set_num_threads(1)  # one byte of one sequence is too little work to share
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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: cannot be used ({str(error).splitlines()[0]})") from None
    return device


def _parser() -> argparse.ArgumentParser:
    model, schedule, sampling = ModelConfig(), TrainConfig(), Sampling()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", help="where to compute (default: the GPU if there is one, else the CPU)")

    shape = argparse.ArgumentParser(add_help=False)
    shape.add_argument(
        "--text", type=_absolute, metavar="FILE_OR_FOLDER", help="(default: the Python library's sources)"
    )
    shape.add_argument("--dim", type=int, help=f"width of the model ({model.dim})")
    shape.add_argument("--layers", type=int, help=f"({model.layers})")
    shape.add_argument("--slots", type=int, help=f"slots per head; tokens in a sliding window ({model.slots})")
    default = ",".join(map(str, model.resolutions))
    shape.add_argument(
        "--resolutions", type=_integers, metavar="R,R,...", help=f"tokens per slot, one number per head ({default})"
    )
    shape.add_argument("--context", type=int, help=f"bytes per training sequence ({schedule.context})")
    shape.add_argument("--batch", type=int, help=f"sequences per step ({schedule.batch})")
    shape.add_argument("--steps", type=int, help=f"({schedule.steps})")
    shape.add_argument("--seed", type=int, help=f"({schedule.seed})")

    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="A small byte-level language model on blurry window attention."
    )
    commands = parser.add_subparsers(required=True, metavar="train | generate | compare")

    sub = commands.add_parser("train", parents=[shape, common], help="train a model")
    sub.add_argument("--mixer", choices=MIXERS, help=f"what mixes tokens ({model.mixer})")
    sub.add_argument("--learning-rate", type=float, help=f"peak ({schedule.learning_rate:g})")
    sub.add_argument(
        "--run", type=Path, metavar="FOLDER", help=f"what is written goes here (default: a new one in {RUNS}/)"
    )
    sub.add_argument("--resume", action="store_true", help="continue the run in --run (default: the newest)")
    sub.add_argument(
        "--parallel",
        choices=STRATEGIES,
        default=STRATEGIES[0],
        help="what the processes of torchrun divide: batches, batches and parameters, or heads (%(default)s)",
    )
    sub.set_defaults(command=_train)

    sub = commands.add_parser("generate", parents=[common], help="continue a prompt")
    sub.add_argument("--run", type=Path, metavar="FOLDER", help=f"a trained run (default: the newest in {RUNS}/)")
    sub.add_argument("--prompt", default="def ", help="text to continue (%(default)r)")
    sub.add_argument("--tokens", type=int, default=400, help="bytes to add (%(default)s)")
    sub.add_argument("--temperature", type=float, help=f"0 takes the likeliest byte ({sampling.temperature:g})")
    sub.add_argument("--top-k", type=int, help=f"draw from the k likeliest bytes; 0: from all ({sampling.top_k})")
    sub.add_argument(
        "--top-p", type=float, help=f"draw from the likeliest bytes that fill this share ({sampling.top_p:g})"
    )
    sub.add_argument("--seed", type=int, help=f"({sampling.seed})")
    sub.set_defaults(command=_generate)

    sub = commands.add_parser("compare", parents=[shape, common], help="train all three mixers alike and plot them")
    sub.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[2e-3, 4e-3],
        metavar="RATE",
        help="tried for each mixer (%(default)s)",
    )
    sub.add_argument("--run", type=Path, metavar="FOLDER", default=RUNS / "compare", help="(%(default)s)")
    sub.set_defaults(command=_compare)
    return parser


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"want whole numbers with commas between, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
