"""TensorRT builders, 8.5 to 11 and TensorRT-RTX, behind one function: `vimdeploy.engines.build.build_engine`."""
