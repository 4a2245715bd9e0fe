"""
A rank that fails in the middle of training ends the others, with a message.

On one machine ``launch`` sees the first process that ends, ends the others and raises what it was.
On another machine the connection to a dead process closes, which gloo reports at once. A process
that lives but does not answer is what the timeout of ``launch`` is for, 30 minutes by default;
here it is 5 minutes, so that a test that would wait fails with another message.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from distributed_runs import free_port, start
from distributed_training import train_and_fail
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

pytestmark = pytest.mark.slow
# What gloo says of a process that is gone; which one depends on what its peer was doing.
GONE = "Connection closed by peer|Connection reset by peer|Broken pipe"


def message_of_failure(folder, failure, failing_rank, num_processes=2, **kwargs):
    with pytest.raises((ProcessExitedException, ProcessRaisedException)) as error:
        start(train_and_fail, num_processes, (str(folder), failure, failing_rank), **kwargs)
    # One rank came to the failure, and nobody to the end.
    assert [x.name for x in folder.iterdir()] == [f"failed {failing_rank}"]
    return str(error.value)


@pytest.mark.parametrize(
    "failure, cause",
    [
        ("kill", "process 1 terminated with signal SIGKILL"),
        # An exception: Detectron2's refusal, of which config.py warns.
        ("empty rank with naiveSyncBN", "AssertionError: SyncBatchNorm.*zero batch size"),
    ],
)
def test_failing_process_ends_training_on_its_machine(tmp_path, failure, cause):
    message = message_of_failure(tmp_path, failure, failing_rank=1)
    # On a busy machine rank 0 may have ended, too, before "launch" looks.
    assert re.search(f"{cause}|{GONE}", message), message


@pytest.mark.parametrize("failure, failing_rank", [("kill", 0), ("exit", 1)])
def test_failing_machine_ends_training_on_the_other(tmp_path, failure, failing_rank):
    """Rank 0 also holds the store at which the processes met."""
    url = f"tcp://127.0.0.1:{free_port()}"

    def run(machine):
        return message_of_failure(
            *(tmp_path, failure, failing_rank, 1), num_machines=2, machine_rank=machine, url=url
        )

    with ThreadPoolExecutor(2) as threads:
        messages = list(threads.map(run, range(2)))
    cause = {"kill": "terminated with signal SIGKILL", "exit": "terminated with exit code 3"}
    assert cause[failure] in messages[failing_rank]
    assert re.search(GONE, messages[1 - failing_rank]), messages


def test_process_that_does_not_answer_ends_training_at_the_timeout(tmp_path):
    message = message_of_failure(tmp_path, "hang", 1, timeout=timedelta(seconds=20))
    assert re.search("Timed out waiting 20000ms", message), message
