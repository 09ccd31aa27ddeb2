"""Long work in parts: a part is a folder that appears when it is complete, so a stopped run goes on where it was.

Parts are shared out over the processes of `accelerate launch`. What is made of them is computed from the parts in
their order, by one process, so the numbers do not depend on how many processes there were.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from core.errors import UserError
from core.files import complete_folder, write_json

RUN_FILE, RESULTS_FILE, PARTS_FOLDER, INPUTS_FILE = "run.json", "results.json", "parts", "inputs.json"


def claim_output(
    output: Path, settings: dict[str, Any], state: PartialState, inputs: dict[str, Any] | None = None
) -> None:
    """Write down what an output folder is for; refuse one that was begun with other settings.

    Args:
        settings: everything that decides the numbers.
        inputs: what describes the inputs. While the run is not finished they may change: `run_parts` does the parts
            concerned again.

    Raises:
        UserError: the folder holds another run; the message names what differs.
    """
    if state.is_main_process:
        path = output / RUN_FILE
        finished = (output / RESULTS_FILE).is_file()
        content = json.loads(json.dumps({"settings": settings, "inputs": inputs or {}}))
        if path.is_file():
            begun = json.loads(path.read_text(encoding="utf-8"))
            differing = _differing(begun["settings"], content["settings"])
            differing += _differing(begun["inputs"], content["inputs"]) if finished else []
            if differing:
                raise UserError(
                    f"output={output} was begun with other {', '.join(differing)}; give another folder, or delete it"
                )
        write_json(path, content)
    state.wait_for_everyone()


def _differing(begun: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(key for key in {*begun, *wanted} if begun.get(key) != wanted.get(key))


def run_parts(
    names: Sequence[str],
    work: Callable[[str, Path], None],
    output: Path,
    state: PartialState,
    description: str,
    inputs: dict[str, Any] | None = None,
) -> list[Path]:
    """Do the parts that are not there yet and return the folders of all, in the order of `names`.

    Neighbouring parts go to the same process, as they often share what they need.

    Args:
        names: of the parts, each fit for a folder name.
        work: gets a name and the folder to write to.
        inputs: by name, what describes a part's inputs; a part that was made of others is done again.
    """
    folders = [output / PARTS_FOLDER / name for name in names]
    if len(set(folders)) < len(folders):
        raise ValueError(f"names of parts must differ, got {sorted(names)}")
    first, last = (len(names) * (state.process_index + k) // state.num_processes for k in (0, 1))
    mine = list(zip(names, folders, strict=True))[first:last]
    for name, folder in tqdm(mine, desc=description, disable=not state.is_local_main_process):
        made_of = json.loads(json.dumps((inputs or {}).get(name)))
        if not _is_made_of(folder, made_of):
            with complete_folder(folder) as temporary:
                work(name, temporary)
                write_json(temporary / INPUTS_FILE, made_of)
    state.wait_for_everyone()
    return folders


def _is_made_of(folder: Path, inputs: Any) -> bool:
    path = folder / INPUTS_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == inputs


def remove_parts(output: Path) -> None:
    """Delete the parts, when what is made of them is written."""
    shutil.rmtree(output / PARTS_FOLDER, ignore_errors=True)
