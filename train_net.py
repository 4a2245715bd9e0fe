#!/usr/bin/env python
"""
Train or evaluate a model: ``tsmask train`` under the name that it has in Detectron2's projects.

``train_net.py --help`` says what it takes. Your own trainer: subclass Trainer, and build it in
a copy of ``teacher_student_mask.engine.main``.
"""

from __future__ import annotations

import sys

from teacher_student_mask.cli import main as tsmask
from teacher_student_mask.engine import Trainer, main, setup

__all__ = ["Trainer", "main", "setup"]

if __name__ == "__main__":
    sys.exit(tsmask(["train", *sys.argv[1:]]))
