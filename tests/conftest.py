"""What all tests share: where the scripts are, how to run one as a user would, a small miniature, a tiny head."""
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads are many times slower
EVIL = "cos\nmkdir\n(V{}\ntR."  # a pickle that makes a folder of the name to fill in, where somebody loads it


def run(script, *args, check=True, cwd=None, env=None, torchrun=0, timeout=300):
    """Runs REPO/script in a process of its own, or in `torchrun` > 0 of them. Returns the finished process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"] if torchrun else []
    command = [sys.executable, *launcher, str(REPO / script), *map(str, args)]
    env = os.environ | (env or {})
    done = subprocess.run(command, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory):
    """A small miniature: 24 training and 8 test pairs at 64x64. Made in this process, which saves the imports."""
    folder, flags = tmp_path_factory.mktemp("data") / "mini", "--mini --count 32 --test-fraction 0.25 --out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate_pairs.py", *flags.split(), str(folder)])
        runpy.run_path(str(REPO / "generate_pairs.py"), run_name="__main__")
    return folder


@pytest.fixture(scope="session")
def head(tmp_path_factory):
    """The folder of a tiny untrained head."""
    import modules
    folder = tmp_path_factory.mktemp("head")
    modules.save_head(modules.ResnetGenerator(channels=8, blocks=1), folder)
    return folder


def pytest_configure(config):
    """Plain `pytest` leaves the slow tests out; `pytest -m slow` runs them, and CI does both."""
    config.addinivalue_line("markers", "slow: minutes of fault injection; left out unless asked for with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"
