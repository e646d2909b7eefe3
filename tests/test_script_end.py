"""How the process of a command line ends."""

import subprocess
import sys

import pytest

_CODE = """
import atexit, threading, time
import lora_lightning.__main__ as program
if {distributed}:
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
atexit.register(print, "atexit")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
program.main = lambda: print("main") or {status}
program.script()
"""


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("status", [0, 2, 75])
def test_threads_and_exit_functions_run_and_the_status_is_kept(distributed, status, tmp_path):
    code = _CODE.format(distributed=distributed, file=tmp_path / "rendezvous", status=status)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.split() == ["main", "thread", "atexit"]
