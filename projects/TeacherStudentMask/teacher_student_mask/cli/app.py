"""
Try a model on a page in the browser.

An image in, its objects with masks out; a slider for the score, and a switch between teacher and
student where the model has a teacher. The model is loaded once.

The page is for this machine alone (--host 0.0.0.0: for all that reach it), asks nothing of the
internet, and no public link is made. Uploaded images are deleted after an hour. Needs the
extra "app": pip install -c constraints.txt gradio

example:
  tsmask app output/train --port 8080
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from ..errors import InputError
from .main import add_model_arguments, load_chosen_model

if TYPE_CHECKING:
    import numpy as np

    from ..trained_model import TrainedModel

__all__ = ["AppSession", "add_arguments", "build_page", "run"]

# Below this score nothing can be shown: the slider's end.
LOWEST_SCORE = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the options."""
    add = parser.add_argument
    add("--port", type=int, default=7860, metavar="N", help="default: %(default)s")
    text = "on which to listen (default: %(default)s, this machine alone)"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=text)
    add_model_arguments(parser)


class AppSession:
    """A loaded model, run by one request at a time, with its latest result."""

    def __init__(self, trained: TrainedModel) -> None:
        self.trained = trained
        self._latest = None, None, None

    def show(self, image: np.ndarray, score: float, head: str) -> tuple[np.ndarray, str]:
        """
        The picture, uint8 RGB, of an RGB image with its objects of at least ``score``; a sentence.

        The model does not run again while only the score changes.
        """
        import numpy as np

        from ..drawing import draw_predictions

        image_bgr = np.ascontiguousarray(image[:, :, ::-1])
        latest_image, latest_head, found = self._latest
        if head != latest_head or not np.array_equal(image, latest_image):
            if len(self.trained.heads) > 1:
                self.trained.model.roi_heads.test_mask_head = head
            found = self.trained.predict(image_bgr)
            self._latest = image, head, found
        shown = found[found.scores >= score]
        picture = draw_predictions(image_bgr, shown, self.trained.class_names)
        text = f"{len(shown)} of {len(found)} objects have a score of {score:.2f} or more."
        return np.ascontiguousarray(picture[:, :, ::-1]), text


def build_page(session: AppSession):
    """Return the page, a ``gradio.Blocks``."""
    import gradio as gr

    def show(image, score, head):
        return (None, "Drop an image.") if image is None else session.show(image, score, head)

    heads = list(session.trained.heads)
    # Uploads older than an hour are deleted.
    with gr.Blocks(
        title="Instance segmentation", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown("# Instance segmentation")
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", sources=["upload", "clipboard"], image_mode="RGB")
                score = gr.Slider(LOWEST_SCORE, 1.0, 0.5, label="Lowest score", elem_id="score")
                options = {"label": "Mask head", "visible": len(heads) > 1, "elem_id": "head"}
                head = gr.Radio(heads, value=heads[0], **options)
            with gr.Column():
                picture = gr.Image(
                    label="Objects", interactive=False, format="png", elem_id="picture"
                )
                summary = gr.Markdown("Drop an image.", elem_id="summary")
        gr.on(
            [image.change, score.change, head.change],
            show,
            [image, score, head],
            [picture, summary],
            trigger_mode="always_last",  # while the slider moves only its latest place counts
            concurrency_limit=1,
            api_visibility="private",
        )
    return page


def run(args: argparse.Namespace) -> None:
    """Serve the page until the process is ended."""
    # Read when gradio is imported: no analytics, no look for a newer version.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    try:
        import gradio  # noqa: F401  Before the model, whose loading takes longer.
    except ImportError as error:
        raise InputError(
            f"gradio cannot be imported ({error}): pip install -c constraints.txt gradio"
        ) from error
    page = build_page(AppSession(load_chosen_model(args, score_threshold=LOWEST_SCORE)))
    try:
        page.launch(server_name=args.host, server_port=args.port, share=False, show_error=True)
    except OSError as error:
        raise InputError(f"--host {args.host} --port {args.port}: {error}") from error
