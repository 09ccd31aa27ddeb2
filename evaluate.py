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

import ast
from importlib import import_module
from pathlib import Path

from core.config import known_task, load_config
from core.errors import run_command
from evaluation import tasks
from evaluation.config import TASKS


def task_words(task: str) -> str | None:
    """The head of a task's module, read without importing it."""
    path = Path(__file__).parent / "evaluation" / "tasks" / f"{task}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def main(arguments: list[str]) -> None:
    task, *rest = arguments or [""]
    if task in ("-h", "--help"):
        print(__doc__.strip())
        return
    config = load_config(TASKS[known_task(task, TASKS)], rest, file_option="--config", about=task_words(task))
    # Networks take seconds to import, which wrong arguments need not wait for.
    import_module(f"{tasks.__name__}.{task}").run(config)


if __name__ == "__main__":
    run_command(main)
