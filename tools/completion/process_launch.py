"""Starting a program in several processes with Detectron2's flags, on GPUs and on the CPU."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
from detectron2.engine import launch
from detectron2.utils import comm

__all__ = ["add_launch_arguments", "start_processes"]


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --num-gpus, --num-machines, --machine-rank and --dist-url, as train_net.py has them."""
    add = parser.add_argument_group("processes, as of train_net.py").add_argument
    add(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, one for each GPU; without a GPU, on the CPU",
    )
    add("--num-machines", type=int, default=1, metavar="N", help="machines in all")
    add("--machine-rank", type=int, default=0, metavar="K", help="number of this one, from 0 on")
    add(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where processes meet: with several machines tcp://HOST:PORT of machine 0, the same "
        "for all (default: a free port of this machine)",
    )


def start_processes(
    function: Callable[[argparse.Namespace], None], args: argparse.Namespace, timeout: timedelta
) -> None:
    """
    Call ``function(args)`` in each process; in this one if there is only one.

    With a GPU it is Detectron2's ``launch`` (NCCL). Without one the processes meet with gloo, in
    every release of Detectron2: that of 0.6 would ask for a GPU.

    Args:
        function: of a module that the processes can import.
        args: of :func:`add_launch_arguments`, and others.
        timeout: how long a process waits for the others.

    Raises:
        torch.multiprocessing.ProcessExitedException, ProcessRaisedException: a process failed; the
            others of this machine are ended.
    """
    counts = (args.num_gpus, args.num_machines)
    if torch.cuda.is_available() or counts == (1, 1):
        launch(function, *counts, args.machine_rank, args.dist_url, (args,), timeout)
        return
    url = f"tcp://127.0.0.1:{_free_port()}" if args.dist_url == "auto" else args.dist_url
    torch.multiprocessing.spawn(_join, (function, args, url, timeout), nprocs=args.num_gpus)


def _join(
    local_rank: int, function: Callable, args: argparse.Namespace, url: str, timeout: timedelta
) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // args.num_gpus))
    torch.distributed.init_process_group(
        "gloo",
        init_method=url,
        timeout=timeout,
        world_size=args.num_machines * args.num_gpus,
        rank=args.machine_rank * args.num_gpus + local_rank,
    )
    comm.synchronize()
    function(args)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
