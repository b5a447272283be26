"""The pictures of a comparison: the loss along random lines through a solution, and on the plane through several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import batches as data
from ..landscape import line, surface
from ..objective import Objective
from ..training.protocol import Place

LINE: dict[str, Any] = {"steps": 25, "radius": 0.5, "draws": 5}     # the radius in lengths of the weights' filters
PLANE: dict[str, Any] = {"steps": 25, "margin": 0.3}


def profile(objective: Objective) -> dict[str, Any]:
    """The loss along filter-normalised directions, drawn from the same random numbers for every solution."""
    found = line(objective, "filter", relative=True, seed=0, **LINE)
    return {"x": found.x, "values": found.values, "stderr": found.stderr, "unit": found.unit, "draws": LINE["draws"],
            "direction": "random, filter-normalised"}


def plane(recipe: Any, at: Place, states: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """Training and test loss on the plane through up to three solutions; with fewer, random directions fill up.

    Args:
        recipe: the model, its loss and data; at most its ``curvature_samples`` samples of each part are looked at.
        at: the folder of the data.
        states: a state_dict by method; the first is the origin.
        folder: where an interrupted grid keeps its state.
    """
    model = recipe.model()
    model.load_state_dict(next(iter(states.values())))
    out: dict[str, Any] = {"methods": list(states), "seed": 0}
    files = {part: folder / f"plane-{part}.pt" for part in ("train", "test")}
    try:
        for part, file in files.items():
            batches = _first(recipe, recipe.held_out("measure" if part == "train" else "test", at))
            objective = Objective(model, recipe.loss, batches, forward=recipe.forward, weight=recipe.weight)
            found = surface(objective, models=list(states.values()), checkpoint=file, **PLANE)
            out |= {part: found.values, f"{part}_samples": round(sum(map(recipe.weight, batches))), "x": found.x,
                    "y": found.y, "models": found.models, "names": found.plane.names,
                    "batch_norm": found.settings["batch_norm"]}
    except ValueError as error:  # the same solution twice, or three on a line
        return out | {"left_out": str(error)}
    for file in files.values():
        file.unlink(missing_ok=True)
    return out


def _first(recipe: Any, batches: Iterable[Any]) -> list[Any]:
    """Batches of as many samples as curvature is measured on."""
    left, out = getattr(recipe, "curvature_samples", 1000), []
    for batch in batches:
        n = data.samples_in(batch)
        part = batch if n <= left else data.samples(batch, slice(left))
        out.append(batch if part is None else part)
        left -= n
        if left <= 0:
            break
    return out
