"""Make it portable: from a checkpoint folder to an ONNX bundle."""
