"""From a SambaY checkpoint to its ONNX graph."""
