"""From the reference network to one ONNX file: torch.export, translation, function bodies, metadata."""
