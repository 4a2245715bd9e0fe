"""Memory of reading, putting together and ranking, of a json with very many objects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
NUM_IMAGES, OBJECTS = 10_000, 8

# In a process of its own: the peak of this one has been higher before.
PROGRAM = """
import sys
from pathlib import Path
from completion.entries import TARGET
from completion.index import index_annotations
from completion.parts import Parts, PartWriter
from completion.ranking import write_ranking
from completion.results import collect_results, write_completed

def peak():
    # Not resource's ru_maxrss, which is at least that of the process that started this one.
    (line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

folder, before = Path(sys.argv[1]), peak()
index = index_annotations(folder / "in.json")
parts = Parts(folder / "parts")
parts.start({})
mask = {"size": [480, 640], "counts": "0" * 300}
with PartWriter(parts, 0) as writer:
    for image in index.images_with_targets().tolist():
        rows = [int(k) for k in index.annotations_of(image) if index.kinds[k] == TARGET]
        record = {"category_id": 1, "segmentation": mask, "area": 1, "score": 0.7, "overlap": 0.0}
        record |= {"agreement": 0.5, "is_fallback": False, "is_rle_instead": False}
        writer.add(
            {"image": image, "seconds": 0.0},
            [{"row": k, "num_unreadable": 0, **record} for k in rows],
        )
results = collect_results(parts, index)
write_ranking(index, parts, results, folder / "ranking.csv")
write_completed(index, parts, results, folder / "out.json")
print(peak() - before)
"""


def test_memory_grows_by_less_than_two_hundred_bytes_an_object(tmp_path):
    """The json has 420 bytes an object; as objects of Python it would take several times that."""
    images = [
        {"id": i, "file_name": f"{i:012}.jpg", "height": 480, "width": 640}
        for i in range(NUM_IMAGES)
    ]
    polygon = [[round(10 + 0.7 * k, 2) for k in range(120)]]
    rows = [
        {"id": k, "image_id": k % NUM_IMAGES, "category_id": 1, "bbox": [10.5, 10.5, 99.0, 50.0]}
        | ({"segmentation": polygon} if k // NUM_IMAGES % 2 else {})
        for k in range(NUM_IMAGES * OBJECTS)
    ]
    data = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "in.json").write_text(json.dumps(data))
    del data, rows, images
    path = f"{ROOT}/tools:{ROOT}/projects/TeacherStudentMask:{ROOT}"
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    # The buffers of the readers, a few MiB, are there whatever the size.
    assert int(result.stdout) < 200 * NUM_IMAGES * OBJECTS + 8 * 2**20
    made = json.loads((tmp_path / "out.json").read_text())["annotations"]
    assert sum(x.get("mask_source") == "model" for x in made) == NUM_IMAGES * OBJECTS // 2
    assert (tmp_path / "ranking.csv").read_text().count("\n") == NUM_IMAGES * OBJECTS // 2 + 1
