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

from importlib import import_module

from core.config import load_config
from core.errors import UserError, run_command
from evaluation.config import TASKS


def main(arguments: list[str]) -> None:
    task, *rest = arguments or [""]
    if task in ("-h", "--help"):
        print(__doc__.strip())
        return
    if task not in TASKS:
        raise UserError(f"the first argument must be one of {', '.join(TASKS)}; got {task!r}")
    config = load_config(TASKS[task], rest, file_option="--config")
    # Networks take seconds to import, which wrong arguments need not wait for.
    import_module(f"evaluation.tasks.{task}").run(config)


if __name__ == "__main__":
    run_command(main)
