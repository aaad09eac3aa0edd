"""Two torchrun agents on one machine, as two nodes: a worker dies, the run goes on and ends as if it had not."""
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import REPO, run
from test_training import assert_equal_runs, command

SCRIPT = "train_cyclegan"


def two_nodes(data, out, *flags):
    """Starts both agents of a two-node run with c10d rendezvous over loopback; returns their processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=1",
             "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
             *command(SCRIPT, data, out, *flags)]
    return [subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True) for _ in range(2)]


def workers_of(agent):
    """Process ids of the trainers that an agent has started (its children that are not data workers)."""
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in children.splitlines() if SCRIPT in line]


@pytest.mark.slow
def test_a_worker_of_two_nodes_is_killed_and_the_run_goes_on(mini_data, tmp_path):
    flags = "--epochs", 4, "--batch-size", 1
    run(*command(SCRIPT, mini_data, tmp_path / "calm", *flags), torchrun=2)

    agents = two_nodes(mini_data, tmp_path / "killed", *flags)
    deadline = time.time() + 180
    while not (tmp_path / "killed/log.csv").exists() and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # into the next epoch
    victims = workers_of(agents[1])
    assert victims, "no worker is running"
    os.kill(victims[0], signal.SIGKILL)
    outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert_equal_runs(tmp_path / "calm", tmp_path / "killed")
