"""One process or several: who does what only one may do, and waiting for it.

`accelerate launch` starts several processes with WORLD_SIZE set. The first samples, quantizes, measures and writes;
all train.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

LONGEST_STAGE = timedelta(days=7)  # how long the others wait for the first process's quantization


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of this run; `accelerator` is None where there is only one."""

    accelerator: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes, measures and talks."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def assemble() -> Team:
    """The team that the environment describes: alone, unless a launcher started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Team()
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    waiting = InitProcessGroupKwargs(timeout=LONGEST_STAGE)
    return Team(Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[waiting]))
