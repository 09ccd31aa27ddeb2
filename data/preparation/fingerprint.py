"""What a file or a folder of images held when something was made from it, to tell later whether it has changed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from data.video.images import list_images

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a video file, of a pose file, or of a folder of frames, masks or OpenPose's .json files.

    Attributes:
        stamp: size and time of the last change; cheap, and enough where it agrees.
        sha256: of the content, for a folder of its files' names and contents. It decides when the stamp differs, as
            after a copy to another disk.
    """

    stamp: str
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> "Fingerprint":
        """The present fingerprint; reads all of the content.

        Raises:
            UserError: the path is missing or cannot be read.
        """
        files = _files(Path(path))
        try:
            return cls(_stamp(files), _content(files))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def is_fresh(self, path: str | Path) -> bool:
        """Whether size and time are as noted, so that nothing needs to be read."""
        try:
            return _stamp(_files(Path(path))) == self.stamp
        except (OSError, UserError):
            return False

    def matches(self, path: str | Path) -> bool:
        """Whether `path` still holds what it held. The content is read only where size or time differ."""
        if self.is_fresh(path):
            return True
        try:
            return _content(_files(Path(path))) == self.sha256
        except (OSError, UserError):
            return False


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return list_images(path) or sorted(path.glob("*.json"))
    if not path.exists():
        raise UserError(f"{path} does not exist")
    return [path]


def _stamp(files: list[Path]) -> str:
    if len(files) == 1:
        status = files[0].stat()
        return f"{status.st_size}:{status.st_mtime_ns}"
    lines = (f"{file.name}:{status.st_size}:{status.st_mtime_ns}" for file in files for status in [file.stat()])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _content(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if len(files) > 1:
            digest.update(f"\n{file.name}:{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
