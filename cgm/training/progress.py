"""What surrounds the steps: the log, the display, Ctrl-C, and the arithmetic."""

import contextlib
import csv
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cgm.checkpoints import replacing
from cgm.training.config import TrainingConfig


class Log:
    """The CSV file: columns step, seconds, ...; rows after the resumed step are dropped."""

    def __init__(self, file: Path, columns: list[str], step: int) -> None:
        self.file = file
        rows: list[list[str]] = []
        if file.exists():
            with file.open(newline="", encoding="utf-8") as opened:
                rows = [
                    row
                    for row in csv.reader(opened)
                    # A row that a crash cut off is no row.
                    if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= step
                ]
        self.seconds = float(rows[-1][1]) if rows else 0.0  # of the runs before
        with (
            replacing(file) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as opened,
        ):
            csv.writer(opened).writerows([columns, *rows])

    def write(self, values: list[float]) -> None:
        with self.file.open("a", newline="", encoding="utf-8") as opened:
            step, *rest = values  # the step whole, however large: it is what rows are found by
            csv.writer(opened).writerow([int(step), *(f"{value:.6g}" for value in rest)])


class Display:
    """Loss, rate and time left: a bar on a terminal, else a line at each log step."""

    def __init__(self, config: TrainingConfig, step: int, console: Console) -> None:
        self.config, self.console, self.logged = config, console, step
        self.start = self.logged_at = time.perf_counter()
        self.bar: Progress | None = None
        self.task = TaskID(0)
        if console.is_terminal:
            self.bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console)
            self.task = self.bar.add_task("", total=config.steps, completed=step)

    def __enter__(self) -> "Display":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    @property
    def seconds(self) -> float:
        """Since this call of `train` began."""
        return time.perf_counter() - self.start

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.task)

    def line(self, step: int, loss: float) -> None:
        now = time.perf_counter()
        rate = (step - self.logged) / (now - self.logged_at)
        self.logged, self.logged_at = step, now
        left = int((self.config.steps - step) / rate)
        text = (
            f"step {step}/{self.config.steps}  loss {loss:.4g}  {rate:.3g} steps/s  "
            f"{rate * self.config.batch_size:.3g} examples/s  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        if self.bar is not None:
            self.bar.update(self.task, description=text)
        else:
            self.console.print(text, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C; the second Ctrl-C is a KeyboardInterrupt."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed  # signals reach the main thread only
        return

    def handle(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def fixed_arithmetic(threads: int) -> Iterator[None]:
    """This many threads, and of cuDNN only algorithms that add in a fixed order.

    These settings are of the process: trainings in two threads must ask for the same.
    """
    cudnn = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(threads or before[0])
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
