"""A driver in a process of its own, with whatever Python it needs; see `driver_protocol.py`."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.speed.peers.weights import STAGES, PeerSettings
from core.errors import UserError
from core.files import write_json

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]


@dataclass(frozen=True)
class Peer:
    driver: tuple[str, ...]  # what Python is given to run, before the driver's three arguments
    family: str  # of `models.checkpoints.convert`
    holds: str  # a file of every checkout, by which it is recognised
    stages: tuple[str, ...]  # of training that it has code for


# Another checkout of this project is compared like a peer, and itself with itself says how far to trust the numbers.
OURS = "tpc_animate"
MOORE, MAGIC = str(FOLDER / "driver_moore.py"), str(FOLDER / "driver_magic_animate.py")
MODULE = "benchmarks.speed.peers.driver_ours"
PEERS = {
    "moore": Peer((MOORE,), "animate_anyone", "src/pipelines/pipeline_pose2vid_long.py", STAGES),
    "magic_animate": Peer((MAGIC,), "magic_animate", "magicanimate/pipelines/pipeline_animation.py", ()),
    OURS: Peer(("-m", MODULE), "animate_anyone", f"{MODULE.replace('.', '/')}.py", STAGES),
}


def chosen_peer(name: str) -> Peer:
    if name not in PEERS:
        raise UserError(f"peer={name} is not one of {', '.join(PEERS)}")
    return PEERS[name]


class PeerSession:
    """A running driver; a context manager that ends it."""

    def __init__(
        self,
        name: str,  # for errors
        command: list[str],  # starts the driver, without its three arguments
        checkout: str | Path,  # the code that it runs, and its working folder
        settings: PeerSettings,
        folder: str | Path,  # weights and inputs
        wait_seconds: float = 10.0,  # for its end
    ):
        self.name, self.wait_seconds = name, wait_seconds
        self._scratch = tempfile.TemporaryDirectory()
        scratch = Path(self._scratch.name)
        write_json(scratch / "settings.json", asdict(settings))
        self._log = open(scratch / "stderr", "w+", encoding="utf-8", errors="replace")
        arguments = [str(Path(path).absolute()) for path in (checkout, scratch / "settings.json", folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        try:
            self._process = subprocess.Popen([*command, *arguments], **pipes, text=True, cwd=checkout)
        except OSError as error:
            self._log.close()
            self._scratch.cleanup()
            raise UserError(f"{name} cannot be started with python={command[0]}: {error.strerror}") from None

    @classmethod
    def of_peer(cls, name: str, python: str, checkout: str | Path, settings: PeerSettings, folder: str | Path) -> Self:
        """A driver of one of `PEERS`, in the peer's own environment."""
        peer, checkout = chosen_peer(name), Path(checkout)
        if not (checkout / peer.holds).is_file():
            raise UserError(f"checkout={checkout} is not a checkout of {name}: it has no {peer.holds}")
        # The driver works in the checkout, where a relative path would mean another file.
        interpreter = str(Path(python).absolute()) if os.sep in python else python
        return cls(name, [interpreter, "-u", *peer.driver], checkout, settings, folder)

    @classmethod
    def of_ours(cls, settings: PeerSettings, folder: str | Path) -> Self:
        return cls("our side", [sys.executable, "-u", *PEERS[OURS].driver], ROOT, settings, folder)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; a driver that fails or ends is a UserError with its reason."""
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = [text.strip() for text in self._log if text.strip()]
            raise UserError(f"{self.name} ended with code {code}: {said[-1] if said else 'it said nothing'}")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{self.name} answered {line.strip()[:200]!r}, which is no JSON") from None
        if "error" in answer:
            raise UserError(f"{self.name} failed at {do}: {' '.join(answer['error'].split())}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            try:
                self._process.stdin.write(json.dumps({"do": "quit"}) + "\n")
                self._process.stdin.close()
            except BrokenPipeError:
                pass
            try:
                self._process.wait(timeout=self.wait_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._scratch.cleanup()
