"""How a command ends on an error: with its message, as a user wants it."""

import ctypes
import dis
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sa_diffusers.cli.parse import DEBUG, plain_parser


_MEMORY = (  # after an error of torch, which this module does not import
    "\nTake less at once (--train_batch_size, --sample_batch_size, --fisher_chunk_size, --eval_batch_size) or try "
    "--mixed_precision bf16, --gradient_checkpointing, --fisher_device cpu, --ewc_device cpu, --lora_rank 16, where "
    "the script has them; docs/cost.md says what each takes. What was finished is kept."
)


@contextmanager
def friendly_errors(argv: list[str] | None = None) -> Iterator[None]:
    """End the program on an error with its message alone and a non-zero exit code, as a user wants it.

    Ctrl-C ends it with 130, SIGTERM with 143, and either a second time at once; what was finished is kept, and the
    same command goes on from there. It ends with the `accelerate launch` that started it. A message that none of our
    code has written says so, and where it comes from. An error of another kind is a bug and keeps its traceback;
    --debug among the arguments (None: of this process) shows every traceback.
    """

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        del before[number]
        raise SystemExit(143) if number == signal.SIGTERM else KeyboardInterrupt

    # A shell lets what runs in its background ignore Ctrl-C.
    heeded = [signal.SIGTERM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)
    before = {number: signal.signal(number, stop) for number in heeded}
    _end_with_launcher()
    resume, said = "Run the same command again to continue.", plain_parser(add_help=False).parse_known_args(argv)[0]
    from sa_diffusers.io.processes import processes_part, reporting  # seconds, which --help need not take

    try:
        with processes_part(), reporting(quiet="quiet" in said, log_json=getattr(said, "log_json", None)):
            yield
    except KeyboardInterrupt:
        print(f"\ninterrupted. {resume}", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as error:
        if error.code == 143:
            print(f"\nterminated. {resume}", file=sys.stderr)
        raise
    except (ValueError, RuntimeError, OSError, ArithmeticError, MemoryError) as error:
        if "debug" in said:
            raise
        full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        where = "" if full or isinstance(error, OSError) else _unforeseen(error)
        print(f"error: {error or type(error).__name__}{_MEMORY if full else where}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM when `accelerate launch` dies, which does not tell its child, and would orphan it."""
    with suppress(OSError):  # no Linux, or a parent that cannot be seen
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        if not {"accelerate", "accelerate-launch", "accelerate.commands.launch"} & {Path(word).name for word in words}:
            return
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _unforeseen(error: BaseException) -> str:
    """Where an error comes from that no `raise` in our own code has put into words; "" for others."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code, module = last.tb_frame.f_code, last.tb_frame.f_globals["__name__"].split(".")[0]
    said = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # not by an operation such as int("x")
    if said and module in ("sa_diffusers", "studies", "__main__"):
        return ""
    place = f"{type(error).__name__} in {Path(code.co_filename).name}, line {last.tb_lineno}"
    return f" ({place}, which nobody has foreseen: please report it with what {DEBUG} shows)"
