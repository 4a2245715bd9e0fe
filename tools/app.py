#!/usr/bin/env python
"""A page on which a trained model runs on the images that are dropped on it. See --help."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections import OrderedDict

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger

from inference.overlays import draw_overlay
from inference.setup import (
    UsageError,
    add_opts_argument,
    add_weights_arguments,
    find_classes,
    make_predictor,
    setup_cfg,
)

logger = logging.getLogger("teacher_student_mask")

DESCRIPTION = """
Serves a page in a browser: an image in, its objects with masks out, a slider for the score, a
switch between teacher and student where the model has a teacher, and a table of the objects.

The model is loaded once. The page is for this machine alone (--host 0.0.0.0: for all that reach
it), asks nothing of the internet, and no public link is made. Images are kept in a temporary folder
that is deleted at the end. Needs the extra "app": pip install -c constraints.txt gradio
"""

EXAMPLES = """
examples:
  %(prog)s --config-file output/mine/config.yaml --weights output/mine/model_final.pth

  another port, and a smaller image for the model:
    %(prog)s --config-file ... --weights ... --port 8080 --opts INPUT.MIN_SIZE_TEST 480

exit code: 0 after Ctrl-C or SIGTERM; 2 if nothing could be started.
"""

COLUMNS = ["#", "class", "score", "x0", "y0", "x1", "y1", "mask pixels"]
HEADS = ("student", "teacher")
# Below this score nothing can be shown: the slider's end.
LOWEST_SCORE = 0.05
# A page keeps what was found on its image while the slider moves.
NUM_KEPT = 4
# Of an image, in pixels: masks have its size, and 100 of them should fit into memory.
MAX_PIXELS = 25_000_000


class Session:
    """One loaded model, run by one request at a time, with its latest results."""

    def __init__(self, predictor: DefaultPredictor, names: list[str]) -> None:
        """
        Args:
            predictor: takes a BGR image.
            names: of the classes.
        """
        self.names = names
        self._predictor = predictor
        self._roi_heads = predictor.model.roi_heads
        self._found: OrderedDict[tuple[str, str], Instances] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def heads(self) -> tuple[str, ...]:
        """Which mask heads can be chosen."""
        return HEADS if hasattr(self._roi_heads, "teacher_mask_head") else HEADS[:1]

    def find(self, image: np.ndarray, head: str) -> Instances:
        """
        Run the model, unless it has just run on this image.

        Args:
            image: uint8, shape (H, W, 3), RGB.
            head: of :attr:`heads`.

        Returns:
            The objects above LOWEST_SCORE, on the CPU.

        Raises:
            ValueError: no image, a larger one than MAX_PIXELS, or another head.
        """
        if image is None:
            raise ValueError("There is no image yet: drop one on the left.")
        if head not in self.heads:
            raise ValueError(f"The mask head is {head!r}; this model has: {', '.join(self.heads)}.")
        height, width = image.shape[:2]
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"The image has {width} x {height} pixels; at most {MAX_PIXELS / 1e6:.0f} million "
                "are allowed here. tools/predict.py takes larger ones."
            )
        content = hashlib.sha256(image.tobytes() + str(image.shape).encode()).hexdigest()
        with self._lock:
            key = content, head
            if key not in self._found:
                if len(self.heads) > 1:
                    self._roi_heads.test_mask_head = head
                found = self._predictor(np.ascontiguousarray(image[:, :, ::-1]))
                self._found[key] = found["instances"].to("cpu")
                while len(self._found) > NUM_KEPT:
                    self._found.popitem(last=False)
            self._found.move_to_end(key)
            return self._found[key]

    def show(
        self, image: np.ndarray, score: float, head: str
    ) -> tuple[np.ndarray, list[list], str]:
        """
        What the page shows; arguments and errors as of :meth:`find`.

        Args:
            score: objects with at least this score are shown.

        Returns:
            The picture, uint8 RGB; the rows of the table; and a sentence.
        """
        found = self.find(image, head)
        shown = found[found.scores >= score]
        picture = draw_overlay(np.ascontiguousarray(image[:, :, ::-1]), shown, self.names)
        text = f"{len(shown)} of {len(found)} objects have a score of {score:.2f} or more"
        if len(found) > len(shown):
            text += f"; the next has {float(found.scores[found.scores < score].max()):.3f}"
        return np.ascontiguousarray(picture[:, :, ::-1]), self._rows(shown), f"{text}."

    def _rows(self, shown: Instances) -> list[list]:
        boxes = shown.pred_boxes.tensor.tolist()
        areas = [None] * len(shown)
        if shown.has("pred_masks"):
            areas = shown.pred_masks.flatten(1).sum(1).tolist()
        rows = zip(shown.pred_classes.tolist(), shown.scores.tolist(), boxes, areas)
        return [
            [i + 1, self.names[label], round(score, 3), *(round(x, 1) for x in box), area]
            for i, (label, score, box, area) in enumerate(rows)
        ]


def build_page(session: Session):
    """Return the page, a ``gradio.Blocks``."""
    import gradio as gr

    def show(image, score, head):
        if image is None:
            return None, [], "Drop an image on the left."
        try:
            return session.show(image, score, head)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        except (RuntimeError, MemoryError, torch.OutOfMemoryError) as error:
            logger.exception("The model failed")
            raise gr.Error(
                f"The model failed on this image: {type(error).__name__}: {error}"
            ) from error

    def in_words(preprocess):
        # gradio's own message has its types and the path of the file.
        def checked(payload):
            try:
                return preprocess(payload)
            except Exception as error:  # of Pillow, of many types
                logger.info(f"An upload cannot be read: {type(error).__name__}: {error}")
                raise gr.Error(
                    "This file cannot be read as an image; try a PNG or JPEG."
                ) from error

        return checked

    # Uploads older than an hour are deleted.
    with gr.Blocks(
        title="Instance segmentation", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown("# Instance segmentation\nDrop an image; move the slider to hide objects.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", sources=["upload", "clipboard"], image_mode="RGB")
                image.preprocess = in_words(image.preprocess)
                score = gr.Slider(
                    LOWEST_SCORE, 1.0, value=0.5, step=0.01, label="Lowest score", elem_id="score"
                )
                head = gr.Radio(
                    list(session.heads),
                    value="student",
                    label="Mask head",
                    visible=len(session.heads) > 1,
                    elem_id="head",
                )
            with gr.Column():
                picture = gr.Image(
                    label="Objects",
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_id="picture",
                )
                summary = gr.Markdown("Drop an image on the left.", elem_id="summary")
        table = gr.Dataframe(headers=COLUMNS, label="Objects", interactive=False, elem_id="objects")
        inputs, outputs = [image, score, head], [picture, table, summary]
        # One request at a time: the model is one.
        for event in (image.change, score.change, head.change):
            event(
                show,
                inputs,
                outputs,
                api_visibility="private",
                concurrency_id="model",
                concurrency_limit=1,
                # While the slider moves only its latest place counts.
                trigger_mode="always_last",
            )
    return page


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_weights_arguments(parser)
    add = parser.add_argument
    add("--port", type=int, default=7860, metavar="N", help="default: %(default)s")
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="on which to listen (default: %(default)s, this machine alone)",
    )
    add_opts_argument(parser)
    return parser, parser.parse_args(argv)


def be_private(folder: str) -> None:
    """Before gradio is imported: no analytics, no look for a newer version, files in ``folder``."""
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=folder,
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_OFFLINE="1",
        HF_HOME=os.path.join(folder, "hf"),
    )


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="teacher-student-app-") as folder:
        be_private(folder)
        try:
            import gradio  # noqa: F401  before the model, whose loading takes longer
        except ImportError as error:
            parser.error(
                f"gradio cannot be imported ({error}): pip install -c constraints.txt gradio"
            )
        try:
            cfg = setup_cfg(args.config_file, args.weights, LOWEST_SCORE, args.opts)
            predictor = make_predictor(cfg)
        except UsageError as error:
            parser.error(str(error))
        # Or the temporary folder would stay.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        page = build_page(Session(predictor, find_classes(cfg).names))
        try:
            page.launch(
                server_name=args.host,
                server_port=args.port,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                footer_links=[],
                max_file_size="50mb",
                show_error=True,
                quiet=True,
                prevent_thread_lock=True,
            )
            print(f"The page: {page.local_url} (Ctrl-C ends it)", flush=True)
            page.block_thread()
        except OSError as error:
            parser.error(f"--host {args.host} --port {args.port}: {error}")
    return 0


if __name__ == "__main__":
    for logger_name in ("detectron2", "fvcore", "teacher_student_mask"):
        setup_logger(name=logger_name)
    sys.exit(main())
