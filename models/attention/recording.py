"""Recording of reference attention during a run of the pipeline or of a training module.

    with AttentionRecording(AttentionConfig(steps=[0, 10, 19], mean=["heads"]), points) as recording:
        frames = pipeline(image, poses, calibration, attention=recording).frames
    recorded = recording.result                                # a models.attention.record.RecordedAttention

Nothing is hooked or replaced: a probe travels to the layers among their arguments, computes a softmax of its own for
the queries that are asked for, and the pass goes on as without it.

Shapes use f = frames, p = recorded queries.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.files import complete_folder
from models.attention.record import RecordedAttention, recording_folder
from models.attention.run import AttentionConfig, AttentionRun, Selection, select
from models.attention.store import Estimate, LayerStore, WindowProbe, estimate
from models.windows import window_weights


class AttentionRecording:
    """Records one run, as a context manager; see the module. When the block raises, nothing is kept.

    Args:
        points: (f, p, 2) places in pixels of the frames, (x, y); the tokens that contain them are recorded. NaN: not
            visible in this frame, not recorded. None: every query token of every recorded layer.
        names: of the points, such as `data.poses.person.COCO_KEYPOINTS`.
    """

    def __init__(
        self,
        config: AttentionConfig | None = None,
        points: np.ndarray | Tensor | None = None,
        names: Sequence[str] | None = None,
    ):
        self.config = config or AttentionConfig()
        self.config.check()
        self.points = None if points is None else np.array(torch.as_tensor(points).cpu(), np.float32)
        if self.points is not None and (self.points.ndim != 3 or self.points.shape[2] != 2):
            raise ValueError(f"points must have shape (frames, points, 2), got {self.points.shape}")
        self.names = None if names is None else tuple(names)
        if self.names is not None and (self.points is None or len(self.names) != self.points.shape[1]):
            raise ValueError(f"names must be one for each point, got {len(self.names)}")
        self._stack: ExitStack | None = None
        self._folder: Path | None = None
        self._selection: Selection | None = None
        self._stores: dict[str, LayerStore] = {}
        self._timesteps: dict[int, int] = {}
        self._result: RecordedAttention | None = None

    def __enter__(self) -> "AttentionRecording":
        if self._stack is not None or self._result is not None:
            raise ValueError("a recording is of one run; make another one")
        self._stack = ExitStack()
        if self.config.folder is not None:
            self._folder = self._stack.enter_context(complete_folder(recording_folder(self.config.folder)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stores, self._stores = self._stores, {}
        stack, self._stack = self._stack, None
        if kind is not None:
            stack.__exit__(kind, error, trace)
            return
        with stack:
            if self._selection is None:
                raise ValueError("no run was recorded: hand the recording to one, attention=recording")
            self._finish(stores)
        if self.config.folder is not None:
            self._result = RecordedAttention.load(self.config.folder)

    def _finish(self, stores: dict[str, LayerStore]) -> None:
        for store in stores.values():
            store.finish()
        recorded = RecordedAttention(
            self._selection,
            tuple(self._timesteps.get(step, -1) for step in self._selection.steps),
            self.points,
            self.names,
            {layer: store.maps for layer, store in stores.items()},
            {layer: store.own for layer, store in stores.items()},
        )
        if self._folder is None:
            self._result = recorded
        else:
            recorded.write_facts(self._folder)

    @property
    def result(self) -> RecordedAttention:
        """What was recorded, once the block has ended.

        Raises:
            ValueError: it has not, or it raised.
        """
        if self._result is None:
            raise ValueError("there is no result before the recording's block has ended, nor after it has failed")
        return self._result

    def estimate(self, run: AttentionRun) -> Estimate:
        """What recording a run would take.

        Raises:
            UserError: it has not the layers, steps, frames or heads that are to be recorded.
        """
        return estimate(self._select(run), run.frames, self.config.folder is not None)

    def _select(self, run: AttentionRun) -> Selection:
        if self.points is not None and len(self.points) != run.frames:
            raise UserError(f"points are of {len(self.points)} frames, the run has {run.frames}")
        return select(self.config, run, None if self.points is None else self.points.shape[1])

    def begin(self, run: AttentionRun) -> None:
        """Make room for a run; called by who runs.

        Raises:
            UserError: what is to be recorded is not there, or would take more than the limit.
        """
        if self._stack is None:
            raise ValueError("the recording is not open: use it inside `with AttentionRecording(...) as recording:`")
        if self._selection is not None:
            raise ValueError("a recording is of one run; make another one")
        selection, limit = self._select(run), self.config.limit_bytes
        needed = estimate(selection, run.frames, self._folder is not None).total_bytes
        if limit is not None and needed > limit:
            raise UserError(
                f"recording attention would take {needed / 2**20:.1f} MiB, limit_bytes allows {limit / 2**20:.1f}; "
                f"record fewer layers, steps, frames or points, or their mean"
            )
        self._selection = selection
        self._stores = {layer: LayerStore(selection, layer, self._folder) for layer in selection.layers}

    def probe(self, step: int, timestep: int, windows: Sequence[range], number: int) -> WindowProbe | None:
        """What looks at one pass: of a window of frames at a denoising step; called by who runs.

        Args:
            step: number of the denoising step, 0 first.
            windows: all windows of the step; number: which of them.

        Returns:
            None when nothing of this pass is recorded.
        """
        selection = self._selection
        if step not in selection.steps:
            return None
        self._timesteps[step] = timestep
        window, weights = windows[number], self._weights(windows)[number]
        rows = [row for row, frame in enumerate(window) if frame in selection.frames and weights[row] > 0]
        if not rows:
            return None
        frames = [window[row] for row in rows]
        seen = np.ones((len(frames), 1), np.float32)
        points = None
        if self.points is not None:
            points = torch.from_numpy(self.points[frames])
            seen = (~np.isnan(self.points[frames]).any(-1)).astype(np.float32)
        place = selection.place("steps", step)
        return WindowProbe(selection, self._stores, place, rows, frames, points, seen * weights[rows, None])

    def _weights(self, windows: Sequence[range]) -> list[np.ndarray]:
        """How much of every window's frames is kept, (size,) each; sums to 1 over the windows of a frame."""
        total = max(window.stop for window in windows)
        blending = [weight.numpy() for weight in window_weights(list(windows), total)]
        if self.config.windows == "mean":
            return blending
        table = np.zeros((len(windows), total), np.float32)
        for row, window, weight in zip(table, windows, blending, strict=True):
            row[window.start : window.stop] = weight
        nearest = table.argmax(axis=0)
        return [
            (nearest[window.start : window.stop] == number).astype(np.float32) for number, window in enumerate(windows)
        ]
