"""Videos, folders of frames and moving images as frames at a constant rate; writing of videos."""

from data.video.files import Video, VideoReader, read_video, video_metadata, write_video

__all__ = ["Video", "VideoReader", "read_video", "video_metadata", "write_video"]
