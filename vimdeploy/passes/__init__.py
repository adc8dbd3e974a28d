"""Graph to graph: each pass takes an ONNX model and returns one, so it serves files from any exporter run."""
