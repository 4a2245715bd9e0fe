"""A camera as something to look at, and a window that shows what is found in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from inference.media import SourceError
from inference.overlays import Draw

__all__ = ["Camera", "LiveView", "Window", "open_window"]

logger = logging.getLogger("teacher_student_mask")


class Camera:
    """
    A camera, with all that programs ask of a :class:`media.Source`.

    The model takes longer for a frame than the camera, so a video with one frame a picture would
    play too fast; :meth:`repeats` keeps each picture for as long as it took.
    """

    is_video = True

    def __init__(
        self,
        device: str,
        max_frames: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            device: number of the camera; or what else OpenCV opens: the address of a stream, or a
                video file, which is read as if it were a camera, but frame by frame.
            max_frames: stop after so many; None: never.
            clock: gives seconds, from any beginning.
        """
        is_number = device.isdigit()
        self.path = Path(f"webcam {device}" if is_number else device)
        self.overlay = Path(f"webcam_{device}.mp4" if is_number else "webcam.mp4")
        # Asked before each frame.
        self.should_stop: Callable[[], bool] = lambda: False
        self._device = int(device) if is_number else device
        self._is_paced = not self.path.is_file()
        self._max_frames = max_frames
        self._clock = clock
        self._fps = 0.0
        self._seconds = 0.0  # of the frame that was read last, since the first one
        self._num_written = 0

    def announced_images(self) -> int:
        """How many frames there will be at most; 0: any number."""
        return self._max_frames or 0

    def fps(self) -> float:
        """Frames a second of the video that is written: what the camera says, 0 if nothing."""
        return self._fps

    def repeats(self) -> int:
        """How many frames of the video the picture just read must fill to keep its time."""
        if not self._is_paced:
            return 1
        due = round(self._seconds * (self._fps or 25.0)) + 1
        number = max(0, due - self._num_written)
        self._num_written += number
        return number

    def image_fields(self, k: int) -> dict:
        """Of the k-th frame: its number and its time in seconds after the first one."""
        return {"frame": k, "seconds": round(self._seconds, 3)} if self._is_paced else {"frame": k}

    def read(self) -> Iterator[np.ndarray]:
        """
        Yield frames, uint8 (H, W, 3), BGR, until the camera ends or is told to stop, with Ctrl+C
        too.

        Raises:
            SourceError: the camera cannot be opened, or gives no frame.
        """
        capture = cv2.VideoCapture(self._device)
        # Frames that wait are old ones; not every camera can be asked for this.
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        fps = capture.get(cv2.CAP_PROP_FPS)
        self._fps = fps if np.isfinite(fps) and fps > 0 else 0.0
        num_frames, start = 0, 0.0
        try:
            while num_frames != self._max_frames and not self.should_stop():
                success, frame = capture.read()
                if not success:
                    break
                now = self._clock()
                start = now if num_frames == 0 else start
                self._seconds = now - start
                num_frames += 1
                yield frame
            else:
                return
        finally:
            capture.release()
        if num_frames == 0:
            raise SourceError(
                f"{self.path}: OpenCV reads no frame of it. Is it connected, and no other program "
                "using it? Other numbers (0, 1, 2, ...) are other cameras."
            )
        logger.info(f"{self.path}: no more frames after {num_frames}.")


class Window:
    """
    A window with a picture, of Python's tkinter: OpenCV without a display has none.

    It closes itself when q or Escape is pressed.
    """

    def __init__(self, title: str) -> None:
        """
        Raises:
            ImportError: this Python has no tkinter.
            tkinter.TclError: there is no display.
        """
        import tkinter

        self._tkinter = tkinter
        self._root = tkinter.Tk()
        self._root.title(f"{title} (q: quit)")
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack()
        for key in ("q", "<Escape>"):
            self._root.bind(key, lambda event: self.close())
        self._root.protocol("WM_DELETE_WINDOW", self.close)
        self.is_closed = False

    def show(self, picture: np.ndarray) -> None:
        """Show a picture, uint8 (H, W, 3), BGR, and take the keys that were pressed."""
        if not self.is_closed:
            height, width = picture.shape[:2]
            ppm = b"P6 %d %d 255\n" % (width, height) + picture[:, :, ::-1].tobytes()
            self._picture = self._tkinter.PhotoImage(data=ppm, format="PPM", master=self._root)
            self._label.configure(image=self._picture)
            self._root.update()

    def close(self) -> None:
        """Close it, once or more often."""
        if not self.is_closed:
            self.is_closed = True
            self._root.destroy()


def open_window(title: str) -> Window | None:
    """Open a window; None where there is no display, which is logged."""
    try:
        return Window(title)
    except ImportError as error:
        reason = f"this Python has no tkinter ({error}; Debian: apt install python3-tk)"
    # tkinter.TclError, whose module may not be there.
    except Exception as error:
        reason = str(error)
    logger.warning(f"No window: {reason}. A video is written instead.")
    return None


class LiveView:
    """Shows pictures in a window: in the place of an :class:`overlays.OverlayWriter`."""

    def __init__(self, camera: Camera, window: Window, draw: Draw) -> None:
        """
        Args:
            camera: told to stop when the window is closed.
            window: closed in the end.
            draw: makes the pictures.
        """
        self._camera, self._window, self._draw = camera, window, draw
        camera.should_stop = lambda: window.is_closed

    def __enter__(self) -> LiveView:
        return self

    def __exit__(self, *_) -> None:
        self._window.close()

    def write(self, image: np.ndarray, outputs: dict) -> np.ndarray:
        """Show the picture, and return it. Arguments as of :data:`overlays.Draw`."""
        picture = self._draw(self._camera, image, outputs)
        self._window.show(picture)
        return picture
