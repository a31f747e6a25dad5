"""`train.py` as torchrun starts it, told to do something to itself: `--act WHAT RANK BATCH`, or `--losses FILE`.

At a rank's so many-th batch of the first attempt it is killed, or gets a signal; the losses of all batches, averaged
over the ranks, are written to a file.
"""

import json
import os
import signal
import sys

import torch
import torch.distributed as dist
from script_runs import load_script

from ditac_timm.training.loop import LossMeter

what, rank, batch, losses_file, *argv = sys.argv[1:]
losses: list[float] = []
update = LossMeter.update


def act(meter: LossMeter, loss: torch.Tensor, samples: int) -> None:
    update(meter, loss, samples)
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    losses.append(mean.item())
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if what != "nothing" and first and os.environ["RANK"] == rank and len(losses) == int(batch):
        os.kill(os.getpid(), signal.Signals[what])


LossMeter.update = act
code = load_script("train").main(argv)
if os.environ.get("RANK", "0") == "0":
    with open(losses_file, "w") as stream:
        json.dump(losses, stream)
sys.exit(code)
