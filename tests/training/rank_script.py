"""`train.py` as torchrun starts it, told to do something to itself: `SIGNAL RANK BATCH LOSSES_FILE`, then its flags.

At a rank's so many-th batch of the first attempt it gets a signal (with `validation:SIGNAL` at so many-th one of
those), none with `nothing`; the losses of all batches, averaged over the ranks, are written to a file.
"""

import json
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from script_runs import load_script
from timm.task.evaluator import ClassificationEvaluator

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
    act_at(len(losses), "")


def act_at(batches: int, stage: str) -> None:
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    when, _, name = what.rpartition(":")
    if name != "nothing" and first and when == stage and os.environ["RANK"] == rank and batches == int(batch):
        os.kill(os.getpid(), signal.Signals[name])


def validate(*arguments: Any) -> None:
    global validated
    validated += 1
    act_at(validated, "validation")
    evaluate(*arguments)


validated = 0
evaluate = ClassificationEvaluator.update
ClassificationEvaluator.update = validate
LossMeter.update = act
code = load_script("train").main(argv)
if os.environ.get("RANK", "0") == "0":
    with open(losses_file, "w") as stream:
        json.dump(losses, stream)
sys.exit(code)
