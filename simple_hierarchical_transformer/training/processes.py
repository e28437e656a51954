"""What several processes have to agree on, and how a run is told to stop."""

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
    """Writes a line to stdout, from the first process alone, above the bar.

    Where nobody reads stdout any more, a run that trains is told to stop, as by a signal.

    Raises BrokenPipeError where there is no such run.
    """
    if os.environ.get('RANK', '0') != '0':
        return
    try:
        if sys.stderr.isatty():
            tqdm.write(printable(text))
        else:
            # tqdm would draw its bar again after each line
            print(printable(text))
        sys.stdout.flush()
    except OSError as error:
        if not unread(error):
            raise
        abandon(sys.stdout)
        if Stop.at_work is None:
            raise BrokenPipeError(*error.args) from error
        Stop.at_work.number = Stop.at_work.number or UNREAD - 128


def init_distributed() -> None:
    """Initialises torch.distributed, before any process needs the others."""
    PartialState(cpu=parse_flag_from_env('ACCELERATE_USE_CPU'))


def check_processes(accelerator: Accelerator) -> None:
    """Refuses a launch whose processes did not find each other, or that shards what is not gathered here."""
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
    """What the main process comes to, for all of them; where it fails, all fail."""
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
    """Those that tell a run to stop."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    # nohup has it ignored
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def outlive_signals(_: int) -> None:
    """Has a data loader's worker outlive a signal that all processes of a run get: the run takes one more step.

    The run ends its workers itself. It sends SIGTERM to those that hang, so a second one ends a worker.
    """

    def end_next_time(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in stop_signals():
        signal.signal(number, end_next_time if number == signal.SIGTERM else signal.SIG_IGN)


class Stop:
    """Notes what tells a run to stop, for the end of the step: a signal, or a stdout that nobody reads.

    A second Ctrl-C or SIGTERM acts at once.
    """

    at_work: ClassVar[Stop | None] = None

    def __init__(self) -> None:
        self.number = 0
        """Of the signal; 0 as long as there was none."""
        self.before = {number: signal.signal(number, self.take) for number in stop_signals()}
        Stop.at_work = self

    def take(self, number: int, _: Any) -> None:
        self.number = number
        # a terminal that closes may send SIGHUP several times
        if number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.before[signal.Signals(number)])

    def release(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        Stop.at_work = None
