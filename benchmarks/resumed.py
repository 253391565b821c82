"""Draws docs/figures/resumed-loss.svg: `python benchmarks/resumed.py`, some minutes on two cores.

Trains examples/train.py three times on generated captions: without a stop; killed (SIGKILL) in
mid-run; and that run continued on two processes. Fails where a loss differs by more than the order
of a sum.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "figures" / "resumed-loss.svg"
STEPS, SAVED, KILLED = 60, 25, 28
LOSS = re.compile(r"step +(\d+) +loss (\S+)")
SUM_ORDER = 3e-4
STYLE = """text{font:12px system-ui,sans-serif;fill:#56607a}.g{stroke:#d5daea}
.w{fill:none;stroke:#5b6cc4;stroke-width:2}.d{fill:none;stroke:#b9772a;stroke-width:1.6}
.s{stroke:#97a0b8;stroke-dasharray:4 4}
@media (prefers-color-scheme:dark){text{fill:#aab3cc}.g{stroke:#39415c}.w{stroke:#8f9df0}
.d{stroke:#e0a659}}"""


def train(shards, *flags, processes=1, killed=None):
    """Gives the losses by step, as the example prints them until it is killed."""
    launched = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    command = [*(launched if processes > 1 else ()), ROOT / "examples" / "train.py", shards]
    command += ["--batch-size", 4, "--steps", STEPS, *flags]
    losses = {}
    # One thread, as torchrun sets it: sums are in the same order.
    settings = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": ROOT}
    command = [sys.executable, *map(str, command)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **settings) as run:
        for line in run.stdout:
            print(line, end="")
            losses |= {int(step): float(loss) for step, loss in LOSS.findall(line)}
            if killed in losses:
                run.send_signal(signal.SIGKILL)
    assert run.returncode == (-signal.SIGKILL if killed else 0)
    return losses


def drawn(whole, resumed):
    """Draws two runs as SVG."""

    def at(step, loss):
        return f"{52 + 692 * (step - 1) / (STEPS - 1):.1f}", f"{260 - 28.2 * loss:.1f}"

    title = f"Loss of {STEPS} steps: one process without a stop, and a run that was killed in step"
    title += f" {KILLED} and continued on two processes after step {SAVED}"
    parts = [f"<title>{title}</title>", f"<style>{STYLE}</style>"]
    for loss in range(0, 9, 2):
        y = at(1, loss)[1]
        parts.append(f'<line class="g" x1="52" x2="744" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="44" y="{float(y) + 4:.1f}" text-anchor="end">{loss}</text>')
    for step in (1, *range(10, STEPS + 1, 10)):
        parts.append(f'<text x="{at(step, 0)[0]}" y="278" text-anchor="middle">{step}</text>')
    x = at(SAVED + 0.5, 0)[0]
    parts.append(f'<line class="s" x1="{x}" x2="{x}" y1="20" y2="260"/>')
    line = " ".join(",".join(at(*point)) for point in whole.items())
    parts.append(f'<polyline class="w" points="{line}"/>')
    for x, y in (at(*point) for point in resumed.items()):
        parts.append(f'<circle class="d" cx="{x}" cy="{y}" r="3.2"/>')
    texts = {
        34: f"killed in step {KILLED}, continued on two processes after step {SAVED} (circles)"
    }
    texts[52] = "one process without a stop (line)"
    x = at(SAVED + 1.5, 0)[0]
    parts += [f'<text x="{x}" y="{y}">{text}</text>' for y, text in texts.items()]
    parts.append('<text x="44" y="296">loss by step</text>')
    box = 'viewBox="0 0 760 300" width="760" height="300" role="img"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n' + "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    argparse.ArgumentParser().parse_args()  # it has none
    with tempfile.TemporaryDirectory() as folder:
        shards, saved = Path(folder) / "shards", Path(folder) / "run.pt"
        make = [sys.executable, "-m", "preprocess", "shards", "pixmo_cap", "--source", "sample"]
        make += ["--limit", "64", "--workers", "1", "--image-size", "112"]
        make += ["--out", shards, "--cache", folder]
        subprocess.run([*map(str, make)], check=True, cwd=ROOT)
        whole = train(shards)
        train(shards, "--checkpoint", saved, "--save-every", SAVED, killed=KILLED)
        resumed = train(shards, "--checkpoint", saved, processes=2)
    assert list(resumed) == list(range(SAVED + 1, STEPS + 1))
    furthest = max(abs(loss - whole[step]) for step, loss in resumed.items())
    print(f"largest difference of a loss: {furthest:.4f}")
    assert furthest <= SUM_ORDER
    FIGURE.write_text(drawn(whole, resumed))
