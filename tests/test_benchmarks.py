"""Each benchmark runs from end to end on a small input; no time is looked at."""

import re
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY_MODEL = (
    "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 16 "
    "MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 16 "
    "MODEL.TEACHER_MASK_HEAD.CONV_DIM 16 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 "
    "MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 20"
)
SMALL = {
    "annotation_checks.py": "--images 20 --objects 120 --rounds 1 --warmup 0",
    "evaluation.py": "--images 20 --objects 120 --detections 600 --rounds 1 --warmup 0",
    "inference.py": f"--device cpu --size 64 --num-images 2 --stock --rounds 1 --opts {TINY_MODEL}",
    "mapper.py": "--rounds 1",
    "startup.py": "--rounds 1 --warmup 0",
    "training_step.py": "--device cpu --size 64 --foreground 4 --rounds 1 --costs "
    f"--baseline {BENCHMARKS.parent} --opts {TINY_MODEL}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark_runs(coco_root, name, monkeypatch, capfd):
    # The programs themselves run in processes of their own.
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name].split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    output, errors = capfd.readouterr()
    assert ended.value.code == 0, errors
    assert "ratio" in output and "CPUs" in output
    values = dict(re.findall(r"^(.*), (?:\w+): ([\d.]+)$", output, re.MULTILINE))
    if name == "inference.py":
        assert float(values["this checkout"]) > 1  # objects were found
    if name == "evaluation.py":  # AP of pycocotools, Detectron2 and ours
        assert len(set(re.findall(r": ([\d.]+)$", output, re.MULTILINE))) == 1
    if name == "training_step.py":  # the same losses in both processes
        losses = re.findall(r"^(?:this checkout|baseline), (\w+): ([\d.]+)$", output, re.MULTILINE)
        assert len(losses) == 4 and len(set(losses)) == 2
