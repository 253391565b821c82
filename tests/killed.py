"""Runs a program of Python that kills itself: as `python -c KILLING TEXT PROGRAM ARGUMENTS...`."""

KILLING = """
import builtins, os, runpy, signal, sys
shown, text = print, sys.argv.pop(1)
def show(*words, **named):
    shown(*words, **named)
    if words[0].startswith(text):
        os.kill(os.getpid(), signal.SIGKILL)
builtins.print = show
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""It dies with the first line that it prints and that begins with TEXT."""
