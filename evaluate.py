"""Evaluate: measure results, split data sets by misalignment, redraw the paper's tables and figures.

    python evaluate.py metrics generated=DIR truth=DIR [protocol=native] [features=stand-in] [masks=DIR] [persons=true]
    python evaluate.py split dataset=DIR                    original and misaligned clips, after the paper
    python evaluate.py sweep                                fidelity against angle and scale (Figures 1b and 9)
    python evaluate.py ablation                             transforms, propagation, subsets (Table 2)
    python evaluate.py table models=[DIR,...]               models without and with TPC (Table 1)
    python evaluate.py attention                            where attention points, without and with TPC (Figure 2)
    python evaluate.py misalignment                         frozen clips of six kinds: what misalignment costs
    python evaluate.py animators                            small animators without and with TPC on these clips

`python evaluate.py TASK --help` lists a task's arguments, `--config FILE` reads them. Every task writes to `output`:
results.json (numbers, configuration, protocol, seeds, counts), config.yaml, table.md, images. The same command again
goes on where it was stopped; `accelerate launch evaluate.py TASK ...` shares the work out, with the same numbers.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, get_type_hints

from core.config import load_config
from core.errors import UserError, run_command

TASKS = ("metrics", "split", "sweep", "ablation", "table", "attention", "misalignment", "animators")


def load_task(task: str) -> tuple[type, Callable[[Any], None]]:
    """Configuration and `run` of a task: `evaluation/tasks/TASK.py` has a `run(config: ITS_CONFIGURATION)`."""
    run = import_module(f"evaluation.tasks.{task}").run
    return get_type_hints(run)["config"], run


def main(arguments: list[str]) -> None:
    task, *rest = arguments or [""]
    if task in ("-h", "--help"):
        print(__doc__.strip())
        return
    if task not in TASKS:
        raise UserError(f"the first argument must be one of {', '.join(TASKS)}; got {task!r}")
    schema, run = load_task(task)
    run(load_config(schema, rest, file_option="--config"))


if __name__ == "__main__":
    run_command(main)
