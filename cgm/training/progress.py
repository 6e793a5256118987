"""What surrounds the steps: the log, the display, signals, and the arithmetic."""

import contextlib
import csv
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cgm.checkpoints import replacing
from cgm.training.config import TrainingConfig

TICK_SECONDS = 1.0  # from one look at the clock to the next
LINE_SECONDS = 5.0  # from one line of progress to the next where there is no terminal
_TABLE_WIDTH = 110  # of the widest one


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


# What runs ----------------------------------------------------------------------------------------
class _Stderr(Console):
    """Progress beside results: where nobody reads it, the results still matter."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def stderr_console() -> Console:
    """A console for progress, so that stdout carries results alone."""
    return _Stderr(stderr=True)


def result_console() -> Console:
    """A console for tables on stdout, whose figures are whole however narrow the terminal is."""
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    return console


def duration(seconds: float) -> str:
    """h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def time_left(since: float, done: int, total: int) -> str:
    """What follows `done of total` in words, by the time since the first of them was begun."""
    if not done:
        return ""
    return f", {duration((time.perf_counter() - since) * (total - done) / done)} left"


class _Watch:
    """Calls `tick` each second from a thread, and knows whether somebody still reads."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.animated = console.is_terminal and not console.is_dumb_terminal and not console.quiet
        self.closed = False  # what was written cannot be read any more
        self.shown_at = time.perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if not self.console.quiet:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            self.tick()

    def tick(self) -> None:
        raise NotImplementedError

    def print_line(self, text: str) -> None:
        self.shown_at = time.perf_counter()
        try:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        except (OSError, SystemExit):  # rich meets a closed pipe with the latter
            self.closed = True


class Status(_Watch):
    """What a command does now, and for how long: a spinner on a terminal, elsewhere lines.

    A line where it changes, unless that lasts less than a second, and every few seconds.

    plan: a line that is shown in any case.
    """

    def __init__(self, plan: str = "", console: Console | None = None) -> None:
        super().__init__(console or stderr_console())
        self.plan, self.text, self.printed = plan, plan, plan
        self.since = time.perf_counter()
        self.spinner = self.console.status(escape(plan)) if self.animated else None

    def __enter__(self) -> Self:
        if self.plan:
            self.print_line(self.plan)
        if self.spinner is not None:
            self.spinner.start()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__()
        if self.spinner is not None:
            with contextlib.suppress(OSError):
                self.spinner.stop()

    def update(self, text: str) -> None:
        """Says what runs from now on."""
        self.text, self.since = text, time.perf_counter()
        if self.spinner is not None:
            self.spinner.update(escape(text))

    def tick(self) -> None:
        now = time.perf_counter()
        taken = now - self.since
        text = f"{self.text}, {taken:.0f} s so far"
        if self.spinner is not None:
            self.spinner.update(escape(text))
        elif now - self.shown_at >= LINE_SECONDS:
            self.print_line(text)
        elif self.text != self.printed and taken >= TICK_SECONDS:
            self.printed = self.text
            self.print_line(self.text)


class Display(_Watch):
    """Step, loss, rate and time left: a bar on a terminal, else lines.

    A line after the first step, at each log step and every few seconds; while a step takes longer
    than that, how long it has taken so far.
    """

    def __init__(self, config: TrainingConfig, step: int, console: Console) -> None:
        super().__init__(console)
        self.config, self.first = config, step
        self.step = self.logged = step  # finished ones; and those of the last rate
        self.start = self.logged_at = self.began = time.perf_counter()
        self.bar: Progress | None = None
        self.task = TaskID(0)
        if self.animated:
            self.bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console)
            self.task = self.bar.add_task("", total=config.steps, completed=step)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__()
        if self.bar is not None:
            with contextlib.suppress(OSError, SystemExit):
                self.bar.stop()

    @property
    def seconds(self) -> float:
        """Since this call of `train` began."""
        return time.perf_counter() - self.start

    def advance(self, step: int) -> None:
        """A step is finished."""
        self.step, self.began = step, time.perf_counter()
        if self.bar is not None:
            self.bar.advance(self.task)

    def due(self, step: int) -> bool:
        """Whether a line is to be shown after this step that the log does not ask for."""
        late = time.perf_counter() - self.shown_at >= (1.0 if self.animated else LINE_SECONDS)
        return not self.console.quiet and (late or step == self.first + 1)

    def line(self, step: int, loss: float) -> None:
        now = time.perf_counter()
        rate = (step - self.logged) / (now - self.logged_at)
        self.logged, self.logged_at = step, now
        self._show(
            f"step {step}/{self.config.steps}  loss {loss:.4g}  {rate:.3g} steps/s  "
            f"{rate * self.config.batch_size:.3g} examples/s  "
            f"{duration((self.config.steps - step) / rate)} left"
        )

    def tick(self) -> None:
        now = time.perf_counter()
        if now - max(self.shown_at, self.began) >= LINE_SECONDS:
            done = f"step {self.step + 1}/{self.config.steps}"
            self._show(f"{done}: {now - self.began:.0f} s so far")

    def _show(self, text: str) -> None:
        self.shown_at = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.task, description=text)
        else:
            self.print_line(text)


# Signals ------------------------------------------------------------------------------------------
@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C, SIGTERM or SIGHUP, which then is in it.

    A second one ends at once: KeyboardInterrupt, or SystemExit with 128 and its number.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals reach the main thread only
        return

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.append(number)

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not all of them are on Windows
        # What is ignored, as SIGHUP is under nohup, stays so; None: not Python's to restore.
        if number is None or signal.getsignal(number) is None:
            continue
        if name != "SIGINT" and signal.getsignal(number) is signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
