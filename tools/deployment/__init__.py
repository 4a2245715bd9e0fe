"""The student without its teacher: as a plain Detectron2 model, TorchScript and ONNX."""
