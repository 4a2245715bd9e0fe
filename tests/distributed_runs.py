"""
Process groups of tests/distributed/: torch.distributed with gloo, on the CPU.

The processes import this module by its name. What they find out goes to files, from which the
tests read it.
"""

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from distributed_evaluation import TEST_SETS, evaluate
from distributed_training import EVERY_METHOD, train_method

# Far more than any step takes. What hangs ends with an error, too, but with another one.
TIMEOUT = timedelta(seconds=300)


def start(function: Callable, num_processes: int, args: tuple = ()) -> None:
    """
    Detectron2's ``launch`` on the CPU. The caller hides GPUs from the processes.

    The one of Detectron2 0.6 refuses to run without a GPU. There ``torch.multiprocessing.spawn``,
    with which it starts its processes, takes its place.

    Args:
        function: of this module; each process calls ``function(*args)``.
    """
    if hasattr(comm, "create_local_process_group"):
        launch(function, num_processes, dist_url="auto", args=args, timeout=TIMEOUT)
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    rest = (function, args, url, num_processes)
    torch.multiprocessing.spawn(_join_and_run, nprocs=num_processes, args=rest)


def _join_and_run(rank, function, args, url, world_size):
    torch.distributed.init_process_group("gloo", url, TIMEOUT, world_size, rank)
    comm.synchronize()
    function(*args)
    # Threads of gloo that outlive the interpreter may abort the process.
    comm.synchronize()
    torch.distributed.destroy_process_group()


def run_everything(folder: str, shapes_root: str) -> None:
    """What one process group does for test_training and test_evaluation."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    folder = Path(folder)
    for name in EVERY_METHOD:
        torch.save(train_method(name), folder / f"training {name} {rank}.pt")
    for name in TEST_SETS:
        results, num_images = evaluate(shapes_root, name, folder / name)
        torch.save(
            {"results": results, "num_images": num_images}, folder / f"evaluation {name} {rank}.pt"
        )
