"""Sample sheets: what a model draws of the same few rows, again and again while it learns.

The folder of a run   samples/step_000500.png   conditions, samples, real images
                      index.html                all of these, newest first, with losses and config

The seed and the numbers of the rows are fixed: what changes from one sheet to the next is the
model. The page is plain HTML with relative links: it can be read where the folder is copied to.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgm.checkpoints import CONFIG_FILE, read_config, replacing
from cgm.data import Dataset
from cgm.model import Model
from cgm.viz.plots import POINT, sample_grid

FOLDER, PAGE = "samples", "index.html"
ROWS, DRAWS = 6, 3  # of each row so many draws; a model without condition draws ROWS x DRAWS
_POINTS = 500  # draws in place of DRAWS, where they are points

_STYLE = """
body { font-family: sans-serif; margin: 2em; }
img { display: block; max-width: 100%; }
table { border-collapse: collapse; margin: 0.5em 0; }
td { border: 1px solid #ccc; padding: 0.2em 0.6em; }
"""


@dataclass(frozen=True, eq=False)
class Shown:
    """The rows that every sheet of a run shows."""

    cond: Tensor | None  # as `sample` takes it
    real: Tensor  # y of these rows
    labels: tuple[str, ...]  # one for each row
    stacked: bool = False  # y is the part of an image below cond
    related: bool = True  # real belongs to cond


def first_rows(dataset: Dataset, *, stacked: bool = False) -> Shown:
    """The first rows of a data set, as they are in epoch 0."""
    rows = torch.arange(min(ROWS, len(dataset)))
    batch = dataset.batch(rows)
    cond = batch["cond"]
    labels = tuple(f"row {row}" for row in rows.tolist())
    if cond is not None and dataset.cond_kind == "class":
        names = dataset.class_names or tuple(map(str, range(dataset.num_classes)))
        labels = tuple(names[i] for i in cond.tolist())
    return Shown(cond, batch["y"], labels, stacked, dataset.paired)


class Sheets:
    """Writes the sheets of a model, and the page that shows them, into the folder of its run."""

    def __init__(self, model: Model, shown: Shown, out: Path) -> None:
        """ValueError if the model draws nothing, or nothing that can be shown."""
        if model.sampling_config is None:
            raise ValueError(f"sheet_every must be 0: {model.family} draws nothing")
        self.model, self.shown, self.out = model, shown, out
        self.cond = shown.cond if shown.cond is not None and shown.cond.dim() == 4 else None
        of_cond = None if self.cond is None else self.cond.shape[1]
        of_y = shown.real.shape[1] if shown.real.dim() == 4 else 0
        colors = (of_y, of_cond) == (2, 1)  # of the luminance cond
        points = shown.real.shape[1:] == POINT
        if of_cond not in (None, 1, 3) or not (of_y in (1, 3) or colors or points):
            cond = "" if self.cond is None else f" and cond {tuple(self.cond.shape)}"
            raise ValueError(
                "sheet_every must be 0: sheets show points, and images with 1 or 3 channels, "
                f"got y {tuple(shown.real.shape)}{cond}"
            )

        self.draws = _POINTS if points else DRAWS

    def write(self, step: int) -> None:
        """The sheet of this step, then the page; the model must be in evaluation mode."""
        shown = self.shown
        (self.out / FOLDER).mkdir(exist_ok=True)
        sample_grid(
            self.out / FOLDER / f"step_{step:06}.png",
            self._draw(),
            cond=self.cond,
            real=None if shown.cond is None else shown.real,
            labels=() if shown.cond is None else shown.labels,
            stacked=shown.stacked,
            real_header="real" if shown.related else "real, of others",
        )
        write_page(self.out, step)

    def _draw(self) -> Tensor:
        """(draws, rows, C, H, W); one draw if all are the same."""
        cond = self.shown.cond
        if cond is None:
            return self.model.sample(ROWS * self.draws, seed=0)[:, None].cpu()
        device = self.model.device
        samples = self.model.sample(self.draws, cond=cond.to(device), seed=0).cpu()
        return samples[:1] if (samples == samples[:1]).all() else samples


def write_page(out: Path, step: int) -> None:
    """index.html of the sheets up to this step: a crash may have left some of later ones."""
    info, losses = read_config(out), dict(_losses(out / "log.csv"))
    found = {
        int(match[1]): file.name
        for file in (out / FOLDER).iterdir()
        if (match := re.fullmatch(r"step_(\d+)\.png", file.name)) and int(match[1]) <= step
    }
    title = escape(out.resolve().name)
    links = (f'<a href="{name}">{name}</a>' for name in ("log.csv", CONFIG_FILE))
    body = [f"<h1>{title}</h1>", f"<p>{' '.join(links)}</p>"]
    for number, name in sorted(found.items(), reverse=True):
        body += [
            f"<h2>Step {number}</h2>",
            f'<img src="{FOLDER}/{name}" alt="samples at step {number}" loading="lazy">',
            *_table([list(row) for row in losses.get(number, {}).items()]),
        ]
    for part in ("config", "training", "data"):
        rows = [[name, json.dumps(value)] for name, value in info.get(part, {}).items()]
        heading = f"model: {info['family']}" if part == "config" else part
        body += [f"<h2>{escape(heading)}</h2>", *_table(rows)]
    page = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}, step {step}</title><style>{_STYLE}</style></head><body>",
        *body,
        "</body></html>",
    ]
    with replacing(out / PAGE) as temporary:
        temporary.write_text("\n".join(page) + "\n", encoding="utf-8")


def _losses(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of log.csv by step."""
    with file.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            yield int(row.pop("step")), row


def _table(rows: list[list[str]]) -> list[str]:
    cells = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows)
    return ["<table>", *(f"<tr>{row}</tr>" for row in cells), "</table>"] if rows else []
