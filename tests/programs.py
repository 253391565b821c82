"""Programs that run another program of Python, on several ranks or to an end of their own."""

import sys


def torchrun(ranks):
    """Arguments of Python in front of those of a program, which runs on that many ranks.

    By default torchrun starts programs unbuffered, and print then writes a line and its end one
    after the other: lines of ranks that share a pipe run into each other.
    """
    launched = ("--standalone", f"--nproc_per_node={ranks}", "--no_python", sys.executable)
    return ["-m", "torch.distributed.run", *launched]


KILLING = """
import builtins, os, runpy, signal, sys
shown, text = print, sys.argv.pop(1)
def show(*words, **named):
    shown(*words, **{**named, "flush": True})
    if words[0].startswith(text):
        os.kill(os.getpid(), signal.SIGKILL)
builtins.print = show
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""As `python -c KILLING TEXT PROGRAM ARGUMENTS...`, the program dies with the first line that it
prints and that begins with TEXT."""

KILLING_RAY = """
import builtins, json, os, pathlib, runpy, signal, sys, time
from ray.train import torch
trainer, (text, saved, count) = torch.TorchTrainer, sys.argv[1:4]
def killing(loop, driver):
    def dying(config):
        shown = builtins.print
        def show(*words, **named):
            if words[0].startswith(text):
                while len(json.loads(saves.read_bytes())["checkpoint_results"]) < int(count):
                    time.sleep(0.01)
                os.kill(driver, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            shown(*words, **named)
        saves = pathlib.Path(saved, "checkpoint_manager_snapshot.json")
        builtins.print = show
        loop(config)
    return dying
torch.TorchTrainer = lambda loop, **named: trainer(killing(loop, os.getpid()), **named)
del sys.argv[:4]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""As `KILLING_RAY TEXT RUN COUNT PROGRAM ARGUMENTS...`, a program of Ray Train dies with its worker
once that has a line to print that begins with TEXT, and the list of checkpoints in the folder RUN
names COUNT: a controller writes it a while after the worker has reported one."""

LEAVING = """
import os, runpy, sys
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""
"""As `LEAVING PROGRAM ARGUMENTS...`, the process ends with the program's last line. With groups of
ranks on a mesh, torch 2.13 aborts one process in ten on a busy machine: in its own destructors,
after Python has ended."""
