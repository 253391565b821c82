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
