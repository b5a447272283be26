"""Claim: a 51 × 51 surface of the digits net takes under a minute on two cores, and less time than
``loss-landscapes`` and of Landscaper on the same grid.

Alternating with each peer, on the same network (64-256-256-10), the same 1000 samples and as many points; wall and
processor time, their ratios with median and range. loss-landscapes runs in this process, on a copy of the model, since
it leaves the user's own moved; its time falls by a third once the C library has stopped giving memory back to the
system (a large tensor freed once does it), so that this is measured as a second case. Landscaper needs NumPy 1 and an
old networkx: it runs in a process and an environment of its own, made in FOLDER where there is none yet, on the same
weights, directions and threads, and its values are compared with ours.

    OMP_NUM_THREADS=2 python benchmarks/landscape.py --landscaper .venv-landscaper [--repeats 5] [--steps 51]
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

import loss_landscapes
import loss_landscapes.metrics
import numpy as np
import torch
from torch import Tensor, nn

from flatmin import Objective, perturbed
from flatmin.landscape import Surface, surface
from flatmin.recipes import find_recipe

HERE = Path(__file__).parent
LANDSCAPER = "1.3.1"
CASES = {"as found": 0, "after 31 MB were freed once": 31 << 20}
Seconds = tuple[float, float]


def seconds(run: Callable[[], object]) -> Seconds:
    """Wall and processor time of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def summary(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def show(case: str, name: str, pairs: list[tuple[Seconds, Seconds]]) -> None:
    for k, clock in enumerate(("wall", "processor")):
        mine, peer = [a[k] for a, _ in pairs], [b[k] for _, b in pairs]
        ratios = [a / b for a, b in zip(mine, peer, strict=True)]
        print(f"{case:28} {clock:9}  flatmin {summary(mine)} s   {name} {summary(peer)} s   ratio {summary(ratios)}",
              flush=True)


def largest_difference(objective: Objective, found: Surface) -> float:
    """Relative, from evaluations one by one, on every 97th point of the grid."""
    worst, steps = 0.0, len(found.x)
    for k in range(0, steps * steps, 97):
        i, j = divmod(k, steps)
        d = [found.x[i].item() * a + found.y[j].item() * b for a, b in zip(*found.directions, strict=True)]
        with perturbed.displaced(objective.parameters, d):
            value = objective.value()
        worst = max(worst, float((value - found.values[i, j]).abs() / value))
    return worst


def beside_loss_landscapes(objective: Objective, x: Tensor, y: Tensor, steps: int, repeats: int) -> None:
    metric = loss_landscapes.metrics.Loss(nn.CrossEntropyLoss(), x, y)

    def theirs() -> object:
        return loss_landscapes.random_plane(copy.deepcopy(objective.model), metric, steps=steps)

    name = f"loss-landscapes {importlib.metadata.version('loss-landscapes')}"
    for case, size in CASES.items():
        torch.empty(size, dtype=torch.uint8)
        show(case, name, [(seconds(lambda: surface(objective, steps)), seconds(theirs)) for _ in range(repeats)])


def environment(folder: Path) -> Path:
    """The Python of an environment with Landscaper, torch as pinned by the project and no torchvision."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making an environment for Landscaper {LANDSCAPER} in {folder}", flush=True)
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", HERE.parent / "constraints.txt", "torch"], check=True)
        pin = next(row for row in (HERE.parent / "constraints.txt").read_text().split() if row.startswith("torch=="))
        subprocess.run([*install, pin, f"landscaper=={LANDSCAPER}"], check=True)
    subprocess.run([python, "-c", "import landscaper"], check=True)
    return python


def even_directions(w: list[Tensor]) -> list[list[Tensor]]:
    """Two, orthogonal in every tensor and of norm √numel there: Landscaper's normalization leaves them as they are."""
    generator = torch.Generator().manual_seed(0)
    out: list[list[Tensor]] = [[], []]
    for t in w:
        a, b = (torch.randn(t.shape, generator=generator) for _ in range(2))
        b -= a * (a * b).sum() / a.square().sum()
        for side, d in enumerate((a, b)):
            out[side].append(d * t.numel() ** 0.5 / d.norm())
    return out


def beside_landscaper(python: Path, objective: Objective, x: Tensor, y: Tensor, steps: int, repeats: int) -> None:
    w = [p.detach() for p in objective.parameters]
    directions = even_directions(w)
    radius = float(torch.stack([t.norm() for t in w]).norm())
    arrays = {f"{'wb'[i % 2]}{i // 2}": t for i, t in enumerate(w)} | {"x": x, "y": y} | \
        {f"d{side}_{i}": t for side in (0, 1) for i, t in enumerate(directions[side])}

    def ours() -> Surface:
        return surface(objective, steps, directions=directions, radius=radius)

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "net.npz", Path(folder) / "grid.npy"
        np.savez(source, allow_pickle=False, **{name: t.numpy() for name, t in arrays.items()})
        distance = steps / (steps - 1)  # its own step is ‖w‖ · distance / (steps / 2)
        command = [python, HERE / "landscaper_worker.py", source, target, steps, distance, torch.get_num_threads()]
        with subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True) as worker:
            assert worker.stdin and worker.stdout
            told, asked = worker.stdout, worker.stdin
            if told.readline().strip() != "ready":
                sys.exit("Landscaper's process ended before its first grid")

            def theirs(size: int = 0) -> Seconds:
                asked.write(f"{size}\n")
                asked.flush()
                wall, cpu = map(float, told.readline().split())
                return wall, cpu

            theirs()
            for case, size in CASES.items():
                show(case, f"Landscaper {LANDSCAPER}", [(seconds(ours), theirs(size)) for _ in range(repeats)])
            asked.close()
        found, grid = ours().values, torch.from_numpy(np.load(target))
    relative = ((found - grid) / found).abs()
    relative[found == found.max()] = 0  # Landscaper adds noise to its maximum
    print(f"largest relative difference from Landscaper's values: {float(relative.max()):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=51)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--landscaper", type=Path, metavar="FOLDER", help="its environment; left out without one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = find_recipe("digits")
    data = recipe.data(None)
    x, y = data.train_inputs, data.train_targets
    torch.manual_seed(0)
    objective = Objective(recipe.model(), nn.CrossEntropyLoss(), (x, y))
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {arguments.threads} threads, "
          f"{arguments.steps} × {arguments.steps}", flush=True)
    surface(objective, 3)
    beside_loss_landscapes(objective, x, y, arguments.steps, arguments.repeats)
    if arguments.landscaper is not None:
        try:
            python = environment(arguments.landscaper)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"Landscaper could not be installed in {arguments.landscaper} ({error}); it is left out")
        else:
            beside_landscaper(python, objective, x, y, arguments.steps, arguments.repeats)
    print(f"largest relative difference from evaluations one by one: "
          f"{largest_difference(objective, surface(objective, arguments.steps)):.1e}")


if __name__ == "__main__":
    main()
