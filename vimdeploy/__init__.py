"""vimdeploy: from a trained Vision Mamba to a verified model file that runs where you need it.

`import vimdeploy` imports no torch, no onnxruntime, no tensorrt: each is imported where it is used.
"""

__version__ = "0.1.0"
