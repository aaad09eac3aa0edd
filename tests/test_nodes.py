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


@pytest.mark.slow
def test_a_worker_of_two_nodes_is_killed_and_the_run_goes_on(mini_data, tmp_path):
    flags = "--epochs", 4, "--batch-size", 1
    run(*command(SCRIPT, mini_data, tmp_path / "calm", *flags), torchrun=2, timeout=900)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
             "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
             *command(SCRIPT, mini_data, tmp_path / "killed", *flags)]
    # Each round has a store of its own. In the shared one, torchrun's default, the restarted processes may find each
    # other's addresses of the round before, which nobody answers at any more ("Gloo connectFullMesh failed").
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    logs = [tmp_path / "node0.txt", tmp_path / "node1.txt"]
    agents = [subprocess.Popen(words, cwd=REPO, env=env, stdout=open(log, "w"), stderr=subprocess.STDOUT)
              for log in logs]
    try:
        while not (tmp_path / "killed/log.csv").exists() and agents[1].poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)  # into the next epoch
        children = subprocess.check_output(["ps", "-o", "pid=,args=", "--ppid", str(agents[1].pid)], text=True)
        trainer = next(int(line.split()[0]) for line in children.splitlines() if SCRIPT in line)
        os.kill(trainer, signal.SIGKILL)
        codes = [agent.wait(timeout=900) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # it takes its worker along
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    assert_equal_runs(tmp_path / "calm", tmp_path / "killed")
