"""
A rank that fails in the middle of training ends the others, with a message.

``launch`` sees the first process that ends, ends the others and raises what it was. A process that
lives but does not answer is what its timeout is for, 30 minutes by default; here it is 5 minutes,
so that a test that would wait fails with another message.
"""

import re

import pytest
from distributed_runs import start
from distributed_training import train_and_fail
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

pytestmark = pytest.mark.slow
# What gloo says of a process that is gone; which one depends on what its peer was doing.
GONE = "Connection closed by peer|Connection reset by peer|Broken pipe"


@pytest.mark.parametrize(
    "failure, cause",
    [
        ("kill", "process 1 terminated with signal SIGKILL"),
        # An exception: Detectron2's refusal, of which config.py warns.
        ("empty rank with naiveSyncBN", "AssertionError: SyncBatchNorm.*zero batch size"),
    ],
)
def test_a_failing_process_ends_training(tmp_path, failure, cause):
    with pytest.raises((ProcessExitedException, ProcessRaisedException)) as error:
        start(train_and_fail, 2, (str(tmp_path), failure))
    # One rank came to the failure, and nobody to the end.
    assert [x.name for x in tmp_path.iterdir()] == ["failed 1"]
    # On a busy machine rank 0 may have ended, too, before "launch" looks.
    assert re.search(f"{cause}|{GONE}", str(error.value)), error.value
