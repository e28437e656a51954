"""Agreement between the processes of a run, and signals that stop it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env
from tqdm import tqdm

from ..terminal import UNREAD, abandon, printable, unread

Found = TypeVar('Found')


def say(text: str) -> None:
    """Prints a line above the progress bar, only in the first process.

    If stdout is closed, a run that is training stops as if it had received a signal.

    Raises BrokenPipeError if no run is training.
    """
    if os.environ.get('RANK', '0') != '0':
        return
    try:
        if sys.stderr.isatty():
            tqdm.write(printable(text))
        else:
            # tqdm would redraw its bar after each line
            print(printable(text))
        sys.stdout.flush()
    except OSError as error:
        if not unread(error):
            raise
        abandon(sys.stdout)
        if Stop.active is None:
            raise BrokenPipeError(*error.args) from error
        Stop.active.number = Stop.active.number or UNREAD - 128


def init_distributed() -> None:
    """Initializes torch.distributed. Call this before processes communicate."""
    PartialState(cpu=parse_flag_from_env('ACCELERATE_USE_CPU'))


def check_processes(accelerator: Accelerator) -> None:
    """Raises ValueError if the launched processes are not connected, or if they use neither DDP nor FSDP2."""
    launched = int(os.environ.get('WORLD_SIZE', '1'))
    if launched != accelerator.num_processes:
        raise ValueError(
            f'{launched} processes were launched and {accelerator.num_processes} found each other: '
            'on CPUs, set ACCELERATE_USE_CPU=true'
        )
    kind = accelerator.distributed_type
    sharded = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    if sharded or kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f'train.py runs with DDP or FSDP2 (launch/ has both), got {kind.value}')


def from_main(do: Callable[[], Found]) -> Found:
    """Calls `do` in the main process and returns its result in all of them. If it raises, all raise."""
    came: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            came[0] = do()
        except (ValueError, OSError) as error:
            came[1] = error
    if PartialState().num_processes > 1:
        broadcast_object_list(came)
    if came[1] is not None:
        raise came[1]
    return came[0]


def stop_signals() -> list[signal.Signals]:
    """The signals that stop a run."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    # nohup makes the process ignore SIGHUP
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def outlive_signals(_: int) -> None:
    """Keeps a data loader's worker alive after a first signal, so that the run can finish its step.

    The run ends its workers itself. It sends SIGTERM to workers that hang, so the second SIGTERM ends a worker.
    """

    def end_next_time(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in stop_signals():
        signal.signal(number, end_next_time if number == signal.SIGTERM else signal.SIG_IGN)


class Stop:
    """Records that a run should stop at the end of its step, because of a signal or a closed stdout.

    A second Ctrl-C or SIGTERM ends the process immediately.
    """

    active: ClassVar[Stop | None] = None
    """The instance of the run that is training."""

    def __init__(self) -> None:
        self.number = 0
        """The number of the signal. 0 if there was none."""
        self.before = {number: signal.signal(number, self.take) for number in stop_signals()}
        Stop.active = self

    def take(self, number: int, _: Any) -> None:
        self.number = number
        # a closing terminal may send SIGHUP several times
        if number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.before[signal.Signals(number)])

    def release(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        Stop.active = None
