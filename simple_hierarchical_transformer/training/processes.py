"""What several processes have to agree on, and how a run is told to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env
from tqdm import tqdm

Found = TypeVar('Found')


def say(text: str) -> None:
    """On the terminal, from the first process alone, above the bar."""
    if os.environ.get('RANK', '0') == '0':
        tqdm.write(text)


def meet() -> None:
    """Has processes find each other, before any is told what to do."""
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


class Stop:
    """Notes SIGTERM and Ctrl-C for the end of the step; a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0
        self.before = {number: signal.signal(number, self.take) for number in (signal.SIGINT, signal.SIGTERM)}

    def take(self, number: int, _: Any) -> None:
        self.number = number
        signal.signal(number, self.before[signal.Signals(number)])
