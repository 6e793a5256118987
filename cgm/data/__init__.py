"""Data sets: the tasks on the images that ship with the package, and folders of the user's own.

dataset.py    what a data set is, the order of an epoch, random crops and mirror images
tasks.py      class_to_image, complete, colorize, edges_to_image, and the tasks of synthetic.py
synthetic.py  bouncing_ball, two_moons, eight_gaussians: drawn, with the truth about them
folders.py    pairs, two_folders, unpaired, classes
fashion.py    the 10,000 shipped images; pack.py makes their file
"""

from cgm.data.dataset import DATA_FIELDS, Batch, Dataset, epoch_order, to_float
from cgm.data.folders import LAYOUTS, load_folder
from cgm.data.tasks import (
    PINK,
    TASKS,
    TEAL,
    edge_map,
    garment_mask,
    lab_to_rgb,
    load_task,
)

__all__ = [
    "DATA_FIELDS",
    "LAYOUTS",
    "PINK",
    "TASKS",
    "TEAL",
    "Batch",
    "Dataset",
    "edge_map",
    "epoch_order",
    "garment_mask",
    "lab_to_rgb",
    "load_folder",
    "load_task",
    "to_float",
]
